"""Draw: which rows of each layer a refit looks at, and what each weighs.

A row weighs as the model's outputs feel it: by the norm of the gradient of the outputs, times random signs
(no labels), with respect to what the original's layer gives there. Padding that a mask hides hardly weighs
anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from surgeon.criteria.data.stand_ins import output_probe
from surgeon.graph.graph import spec
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import Layer, find_layers
from surgeon.recovery.linear.equations import Equations
from surgeon.recovery.runs.paired_run import PairedRun, twin
from surgeon.recovery.runs.recording import Pair, Progress, Recording

_PER_UNKNOWN, _LEAST_ROWS = 40, 20_000  # rows that are drawn for a site
_PROBES = 2
_LEAST = 0.05  # of the mean weight: a ReLU that is off feels nothing, yet it has to stay off


class RowSample:
    """The rows, the same for every pass.

    Attributes:
        sites, left: see `find_layers`.
        picked: of each site, the numbers of its rows in each batch. weights: theirs, 1 in the mean over all
            batches.
        remark: why all rows weigh alike; "" if they do not.
    """

    def __init__(self, recording: Recording, narrow: KeptEntries, track: Progress, seed: int = 0) -> None:
        self.sites, self.left = find_layers(recording.small, recording.big)
        self.remark, self.seed = "", seed
        pairs = recording.pairs()
        generator = torch.Generator().manual_seed(seed)
        equations = {site: Equations(site, recording.small.tensors[site.weight.name]) for site in self.sites}
        places = {
            site: [_places(site, equations[site], pairs[0], pair) for pair in pairs] for site in self.sites
        }
        self.picked = {
            site: _pick(places[site], equations[site].unknowns(), generator) for site in self.sites
        }
        felt: dict[Layer, list[Tensor]] = {site: [] for site in self.sites}
        try:
            for number, pair in track(list(enumerate(pairs)), "gradients"):
                squares = _felt(
                    pair.big, [twin(site.twin, pairs[0].big, pair.big) for site in self.sites], number
                )
                for site, square in zip(self.sites, squares, strict=True):
                    kept = narrow(site.twin, square)
                    if (
                        equations[site].places(kept) == places[site][number]
                    ):  # a run that takes decisions may give other rows
                        felt[site].append(equations[site].felt(kept, self.picked[site][number]))
        except RuntimeError as error:
            self.remark = f"all rows of a layer weigh alike, as no gradient can be computed: {str(error).splitlines()[0]}"
            felt = {site: [] for site in self.sites}
        self.weights = {site: _scaled(felt[site], self.picked[site]) for site in self.sites}

    def some(self, count: int, batches: int) -> Tensor:
        """Numbers of some of a batch's `count` rows, for what is no site's result."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[
            : math.ceil(_LEAST_ROWS / batches)
        ]


def _places(site: Layer, equations: Equations, first: Pair, pair: Pair) -> int:
    """Rows of a site in a batch."""
    return equations.places(torch.empty(spec(twin(site.node, first.small, pair.small)).shape, device="meta"))


def _pick(places: list[int], unknowns: int, generator: torch.Generator) -> list[Tensor]:
    share = max(_PER_UNKNOWN * unknowns, _LEAST_ROWS) / max(sum(places), 1)
    return [torch.randperm(count, generator=generator)[: math.ceil(count * share)] for count in places]


@torch.enable_grad()
def _felt(run: PairedRun, nodes: list[fx.Node], seed: int) -> list[Tensor]:
    """How much a run's outputs change with each node's value: its squared gradients (see `output_probe`),
    summed over probes.

    Raises:
        RuntimeError: an op has no derivative, or a gradient is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = set(nodes)
    for node in nodes:
        run.pin(node)
    for node in run.nodes[:-1]:
        run.through(node)
        if node in wanted and not run.values[node].requires_grad:
            run.values[node] = run.values[node].detach().requires_grad_()
    values = [run.values[node] for node in nodes]
    outputs = [value for value in run.finish() if value.requires_grad]
    found = [torch.zeros_like(value) for value in values]
    for probe in range(_PROBES if outputs else 0):
        more = probe + 1 < _PROBES
        gradients = torch.autograd.grad(
            output_probe(outputs, generator=generator), values, retain_graph=more, allow_unused=True
        )
        for total, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
    if not all(bool(torch.isfinite(total.sum())) for total in found):
        raise RuntimeError("one is NaN or infinite")
    return found


def _scaled(felt: list[Tensor], picked: list[Tensor]) -> list[Tensor]:
    """Weights of the rows, from the squared norms of their gradients; all alike if some are unknown, or none
    is felt.
    """
    norms = [square.sqrt() for square in felt]
    mean = sum(float(norm.double().sum()) for norm in norms) / max(sum(map(len, picked)), 1)
    if not mean or len(felt) < len(picked):
        return [torch.ones(len(numbers)) for numbers in picked]
    return [(norm / mean + _LEAST) / (1 + _LEAST) for norm in norms]
