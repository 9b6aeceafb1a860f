"""A pass of recovery: one run in lockstep that sets weights, layer by layer, from what the original gives there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph import spec
from surgeon.recovery.least_squares import Normal
from surgeon.recovery.lockstep import Pair, Recording, distance, twin
from surgeon.recovery.logits import Aim, find_meetings
from surgeon.recovery.narrow import Narrow
from surgeon.recovery.rows import Equations
from surgeon.recovery.sites import Site, find_sites, pulled

RIDGES = (1e-6, 1e-4, 1e-2)  # of which the one that does best on held-out batches is taken
WIDEST = 2400  # unknowns of one output that are solved for exactly
_EXACT = 1e-13  # of the mean square of what a layer should give: below, rounding is all that is left
_PER_UNKNOWN, _LEAST_ROWS = 40, 20_000  # rows that are sampled for a site

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # wraps what is walked through, to show progress


@dataclasses.dataclass(frozen=True)
class Fit:
    """What became of one layer: root mean squared error of its results on held-out batches, relative to the original's results.

    Attributes:
        rows, unknowns: equations and unknowns of each output; fewer rows than unknowns are rank-deficient: the ridge then leaves
            what the data do not show as it was.
        skipped: why it was left alone; "" if it was not.
    """

    name: str
    before: float = math.nan
    after: float = math.nan
    rows: int = 0
    unknowns: int = 0
    skipped: str = ""

    @property
    def taken(self) -> bool:
        return self.after != self.before and not self.skipped


@dataclasses.dataclass
class Pass:
    """The outcome: layers, outputs of both models on every batch, and the peak of the values held."""

    fits: list[Fit]
    distance: float
    peak: int


class Fitting:
    """Sets the weights of every site so that it gives what the original gives.

    Args:
        how: "refit" (affine least squares), "means" (the constant alone) or "variance" (constant and scale).
    """

    def __init__(
        self,
        recording: Recording,
        narrow: Narrow,
        how: str,
        *,
        ridges: Sequence[float] = RIDGES,
        widest: int = WIDEST,
        seed: int = 0,
    ) -> None:
        self.recording, self.narrow, self.how, self.ridges, self.widest = recording, narrow, how, ridges, widest
        self.sites, self.left = find_sites(recording.small, recording.big)
        self.meetings = find_meetings(recording.small, recording.big, self.sites) if how == "refit" else {}
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def run(self, track: Track) -> Pass:
        pairs = self.recording.pairs()
        for pair in pairs:
            for site in self.sites:
                for node in self._aims(site, pairs[0], pair):
                    pair.big.pin(node)
        fits = [Fit(name.removesuffix(".weight"), skipped=reason) for name, reason in self.left.items()]
        peak = 0
        for site in track(self.sites, self.how):
            for pair in pairs:
                pair.small.before(twin(site.node, pairs[0].small, pair.small))
                for node in self._aims(site, pairs[0], pair):
                    pair.big.through(node)
            fits.append(self._fit(site, pairs))
            peak = max(peak, sum(pair.big.bytes + pair.small.bytes for pair in pairs))
            for pair in pairs:
                for node in self._aims(site, pairs[0], pair):
                    pair.big.release(node)
        return Pass(fits, distance(pair for pair in pairs if pair.held), peak)

    def _aims(self, site: Site, first: Pair, pair: Pair) -> list[fx.Node]:
        """The values of a batch's original run that say what the site should give."""
        found = [site.target]
        if site in self.meetings:
            found += [self.meetings[site].big.queries, self.meetings[site].big.keys]
        return [twin(node, first.big, pair.big) for node in found]

    def _fit(self, site: Site, pairs: list[Pair]) -> Fit:
        tensors = self.recording.small.tensors
        weight = tensors[site.weight.name]
        equations = Equations(site, weight)
        unknowns = equations.unknowns()
        if self.how == "refit" and unknowns > self.widest:
            return Fit(site.name, unknowns=unknowns, skipped=f"{unknowns} unknowns are more than {self.widest}")
        learned, judged, scale = self._sums(site, equations, weight, pairs)
        if scale is None:
            return Fit(site.name, skipped="the original has other rows here")
        w, b = equations.matrix(weight).double(), self._constant(site, learned)
        energy = float((judged.square / max(judged.count, 1) * scale).sum())
        before = float((judged.error(w, b) * scale).sum())
        plain = Fit(site.name, 0.0, 0.0, learned.count, unknowns)
        if before <= _EXACT * energy:
            return plain
        best, found = before, None
        for new_w, new_b in self._candidates(site, learned, w, b):
            error = float((judged.error(new_w, new_b) * scale).sum())
            if error < best or self.how == "variance":  # more variance is more error here: what it is good for shows at the end
                best, found = error, (new_w, new_b)
        if found is not None:
            keep = scale > 0
            self._write(site, equations, torch.where(keep[:, None], found[0], w), torch.where(keep, found[1], b))
        energy = max(energy, 1e-300)
        return dataclasses.replace(plain, before=math.sqrt(before / energy), after=math.sqrt(best / energy))

    def _candidates(self, site: Site, learned: Normal, w: Tensor, b: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if self.how == "refit":
            return (learned.solve(w, b, ridge, bool(site.bias)) for ridge in self.ridges)
        if not site.bias:
            return ()
        return [(w, learned.constant(w, b))] if self.how == "means" else [learned.scaled(w, b)]

    def _sums(self, site: Site, equations: Equations, weight: Tensor, pairs: list[Pair]) -> tuple[Normal, Normal, Tensor | None]:
        """Normal equations of the batches to learn from and of those to judge by; and how much an error of each output weighs
        where it is compared (the square of what is between), 0 for outputs that cannot be fitted."""
        first = pairs[0]
        aim = Aim(self.meetings[site], self.narrow, pairs) if site in self.meetings else None
        w = equations.matrix(weight)
        learned, judged = (Normal(w.shape[0], w.shape[1], w.shape[2], weight.device) for _ in range(2))
        scale = torch.ones(w.shape[0], w.shape[2], dtype=torch.float64, device=weight.device)
        unknowns = w.shape[1]
        goal = max(_PER_UNKNOWN * unknowns, _LEAST_ROWS)
        total = sum(self._places(site, equations, first, pair) for pair in pairs)
        for pair in pairs:
            node = twin(site.node, first.small, pair.small)
            data: Any = node.args[site.data]
            wanted = self.narrow(site.target, pair.big.value(twin(site.target, first.big, pair.big)))
            if site.sum is not None and wanted.shape != spec(twin(site.sum, first.small, pair.small)).shape:
                return learned, judged, None
            if aim is not None:
                wanted = aim(wanted, pair)
            more, wanted = wanted + 1, pulled(site, first.small, pair.small, wanted)
            if wanted.shape != spec(node).shape:
                return learned, judged, None
            places = equations.places(wanted)
            some = min(places, math.ceil(places * goal / total))
            picked = torch.randperm(places, generator=self.generator)[:some].to(weight.device)
            x, y = equations.rows(pair.small.value(data), wanted, picked)
            odd = ~torch.isfinite(y).all(1)
            if pair is first:  # all that is between is affine
                _, lifted = equations.rows(pair.small.value(data), pulled(site, first.small, pair.small, more), picked[:1])
                scale = (lifted - y[:, :1])[:, 0].double().square().reciprocal()
            scale[odd] = 0
            (judged if pair.held else learned).add(x, y.masked_fill(odd[:, None], 0))
        return learned, judged, scale

    def _places(self, site: Site, equations: Equations, first: Pair, pair: Pair) -> int:
        return equations.places(torch.empty(spec(twin(site.node, first.small, pair.small)).shape, device="meta"))

    def _constant(self, site: Site, sums: Normal) -> Tensor:
        """The constant as it is now."""
        if not site.bias or site.norm:
            return torch.zeros_like(sums.square)
        return self.recording.small.tensors[site.bias].double().reshape(sums.square.shape)

    def _write(self, site: Site, equations: Equations, w: Tensor, b: Tensor) -> None:
        tensors = self.recording.small.tensors
        weight = tensors[site.weight.name]
        weight.copy_(equations.weight(w).to(weight.dtype))
        if site.bias:
            held = tensors[site.bias]
            flat = b.reshape(held.shape).to(held.dtype)
            held.copy_(held - flat if site.norm else flat)
