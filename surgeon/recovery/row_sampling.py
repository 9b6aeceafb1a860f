"""RowSample: which rows of each layer a refit looks at, and their weights.

Rows are weighted by the norm of the output gradient: of the outputs times random signs (no labels), with respect to
what the original's layer gives there. The weights of padding that a mask hides are almost zero.
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

_PER_UNKNOWN, _LEAST_ROWS = 40, 20_000  # rows that are drawn for a layer
_PROBES = 2
_LEAST = (
    0.05  # of the mean weight: where a ReLU gives zero the gradient is zero, yet it has to give zero still
)


class RowSample:
    """The rows, the same for every pass.

    Attributes:
        layers, left: see `find_layers`.
        picked: of each layer, the numbers of its rows in each batch. weights: theirs, 1 in the mean over all
            batches.
        remark: why all rows have the same weight; "" if they have not.
    """

    def __init__(
        self, recording: Recording, kept_entries: KeptEntries, track: Progress, seed: int = 0
    ) -> None:
        self.layers, self.left = find_layers(recording.small, recording.big)
        self.remark, self.seed = "", seed
        pairs = recording.pairs()
        generator = torch.Generator().manual_seed(seed)
        equations = {
            layer: Equations(layer, recording.small.tensors[layer.weight.name]) for layer in self.layers
        }
        places = {
            layer: [_places(layer, equations[layer], pairs[0], pair) for pair in pairs]
            for layer in self.layers
        }
        self.picked = {
            layer: _pick(places[layer], equations[layer].unknowns(), generator) for layer in self.layers
        }
        sensitivity: dict[Layer, list[Tensor]] = {layer: [] for layer in self.layers}
        try:
            for number, pair in track(list(enumerate(pairs)), "gradients"):
                squares = _squared_gradients(
                    pair.big, [twin(layer.twin, pairs[0].big, pair.big) for layer in self.layers], number
                )
                for layer, square in zip(self.layers, squares, strict=True):
                    kept = kept_entries(layer.twin, square)
                    if (
                        equations[layer].places(kept) == places[layer][number]
                    ):  # a run that takes decisions may give other rows
                        sensitivity[layer].append(
                            equations[layer].sensitivity(kept, self.picked[layer][number])
                        )
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            self.remark = f"all rows of a layer have the same weight, as no gradient can be computed: {why}"
            sensitivity = {layer: [] for layer in self.layers}
        self.weights = {layer: _scaled(sensitivity[layer], self.picked[layer]) for layer in self.layers}

    def some(self, count: int, batches: int) -> Tensor:
        """Numbers of some of a batch's `count` rows, for what is no layer's result."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[
            : math.ceil(_LEAST_ROWS / batches)
        ]


def _places(layer: Layer, equations: Equations, first: Pair, pair: Pair) -> int:
    """Rows of a layer in a batch."""
    return equations.places(torch.empty(spec(twin(layer.node, first.small, pair.small)).shape, device="meta"))


def _pick(places: list[int], unknowns: int, generator: torch.Generator) -> list[Tensor]:
    share = max(_PER_UNKNOWN * unknowns, _LEAST_ROWS) / max(sum(places), 1)
    return [torch.randperm(count, generator=generator)[: math.ceil(count * share)] for count in places]


@torch.enable_grad()
def _squared_gradients(run: PairedRun, nodes: list[fx.Node], seed: int) -> list[Tensor]:
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


def _scaled(sensitivity: list[Tensor], picked: list[Tensor]) -> list[Tensor]:
    """Weights of the rows, from the squared norms of their gradients; all the same if some are unknown, or all
    are zero.
    """
    norms = [square.sqrt() for square in sensitivity]
    mean = sum(float(norm.double().sum()) for norm in norms) / max(sum(map(len, picked)), 1)
    if not mean or len(sensitivity) < len(picked):
        return [torch.ones(len(numbers)) for numbers in picked]
    return [(norm / mean + _LEAST) / (1 + _LEAST) for norm in norms]
