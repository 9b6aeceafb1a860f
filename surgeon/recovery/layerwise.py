"""A pass of recovery: one run of both models side by side that sets weights, layer by layer, from what the original gives
there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import spec
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import Layer, pulled
from surgeon.recovery.linear.equations import Equations
from surgeon.recovery.linear.least_squares import Normal
from surgeon.recovery.linear.rows import Rows
from surgeon.recovery.logits import LogitTarget, find_meetings
from surgeon.recovery.row_sampling import RowSample
from surgeon.recovery.runs.paired_run import twin
from surgeon.recovery.runs.recording import Pair, Progress, Recording, distance

RIDGES = (1e-6, 1e-4, 1e-2)  # of which the one that does best on held-out batches is taken
WIDEST = 2400  # unknowns of one output that are solved for exactly
_EXACT = 1e-13  # of the mean square of what a layer should give: below, rounding is all that is left


@dataclasses.dataclass(frozen=True)
class Fit:
    """What became of one layer: root mean squared error of its results on held-out batches, relative to the
    original's results.

    Attributes:
        rows, unknowns: equations and unknowns of each output; fewer rows than unknowns are rank-deficient:
            the ridge then leaves what the data do not show as it was.
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
        """Whether the new weights were kept."""
        return self.after != self.before and not self.skipped


@dataclasses.dataclass
class Pass:
    """The outcome: layers, outputs of both models on every batch, and the peak of the values held."""

    fits: list[Fit]
    distance: float
    peak: int


class Fitting:
    """Sets the weights of every layer so that it gives what the original gives.

    Args:
        sample: the rows to look at.
        how: "refit" (affine least squares), "means" (the constant alone) or "variance" (constant and scale).
        ridges: of which each layer takes the one that does best on its own held-out rows.
    """

    def __init__(
        self,
        recording: Recording,
        kept_entries: KeptEntries,
        sample: RowSample,
        how: str,
        widest: int,
        ridges: Sequence[float],
    ) -> None:
        self.recording, self.kept_entries, self.sample, self.how, self.widest = (
            recording,
            kept_entries,
            sample,
            how,
            widest,
        )
        self.ridges = ridges
        self.layers = sample.layers
        self.meetings = find_meetings(recording.small, recording.big, self.layers) if how == "refit" else {}
        self.aims: dict[Layer, LogitTarget] = {}

    @torch.no_grad()
    def run(self, track: Progress) -> Pass:
        """Refit every layer once, in the order in which the model runs them."""
        pairs = self.recording.pairs()
        for pair in pairs:
            for layer in self.layers:
                for node in self._aims(layer, pairs[0], pair):
                    pair.big.pin(node)
        fits = [
            Fit(name.removesuffix(".weight"), skipped=reason) for name, reason in self.sample.left.items()
        ]
        peak = 0
        for layer in track(self.layers, self.how):
            for pair in pairs:
                pair.small.before(twin(layer.node, pairs[0].small, pair.small))
                for node in self._aims(layer, pairs[0], pair):
                    pair.big.through(node)
            if layer in self.meetings:
                self.aims[layer] = LogitTarget(self.meetings[layer], self.kept_entries, pairs)
            fits.append(self._fit(layer, pairs))
            peak = max(peak, sum(pair.big.bytes + pair.small.bytes for pair in pairs))
            for pair in pairs:
                for node in self._aims(layer, pairs[0], pair):
                    pair.big.release(node)
        return Pass(fits, distance(pair for pair in pairs if pair.held), peak)

    def _aims(self, layer: Layer, first: Pair, pair: Pair) -> list[fx.Node]:
        """The values of a batch's original run that say what the layer should give."""
        found = [layer.target]
        if self._is_wide(layer):
            found += [node for node in [self._inputs(layer)] if node is not None]
        if layer in self.meetings:
            found += [self.meetings[layer].big.queries, self.meetings[layer].big.keys]
        return [twin(node, first.big, pair.big) for node in found]

    def _fit(self, layer: Layer, pairs: list[Pair]) -> Fit:
        weight = self.recording.small.tensors[layer.weight.name]
        equations = Equations(layer, weight)
        unknowns = equations.unknowns()
        if not all(self._comparable(layer, pair, pairs[0]) for pair in pairs):
            return Fit(layer.name, skipped="the original has other rows here")
        wide = self._is_wide(layer)
        if wide and (self._inputs(layer) is None or equations.channels > self.widest):
            return Fit(
                layer.name, unknowns=unknowns, skipped=f"{unknowns} unknowns are more than {self.widest}"
            )
        w = equations.matrix(weight).double()
        b = self._constant(layer, (w.shape[0], w.shape[2]))
        rows = Rows(
            layer, equations, pairs, self.sample, lambda pair, more: self.wanted(layer, pair, pairs[0], more)
        )
        plain = Fit(layer.name, 0.0, 0.0, rows.count(False), unknowns)
        if wide:
            judge: Callable[[Tensor, Tensor], Tensor] = rows.error
            candidates: Iterable[tuple[Tensor, Tensor]] = self._by_channels(
                layer, equations, rows, pairs, w, b
            )
        else:
            learned, judged = (rows.normal(held) for held in (False, True))
            judge, candidates = judged.error, self._candidates(layer, learned, w, b)
        energy = max(float((judge(torch.zeros_like(w), torch.zeros_like(b)) * rows.scale).sum()), 1e-300)
        before = float((judge(w, b) * rows.scale).sum())
        if before <= _EXACT * energy:
            return plain
        best, found = before, None
        for new_w, new_b in candidates:
            error = float((judge(new_w, new_b) * rows.scale).sum())
            if (
                error < best or self.how == "variance"
            ):  # more variance is more error here: what it is good for shows at the end
                best, found = error, (new_w, new_b)
        if found is not None:
            keep = rows.scale > 0
            self._write(
                layer, equations, torch.where(keep[:, None], found[0], w), torch.where(keep, found[1], b)
            )
        return dataclasses.replace(plain, before=math.sqrt(before / energy), after=math.sqrt(best / energy))

    def _is_wide(self, layer: Layer) -> bool:
        """Whether a refit has too many unknowns for normal equations."""
        return (
            self.how == "refit"
            and Equations(layer, self.recording.small.tensors[layer.weight.name]).unknowns() > self.widest
        )

    def _inputs(self, layer: Layer) -> fx.Node | None:
        """What the original's layer reads, where one map of channels can serve all taps of a wide
        convolution.
        """
        node: Any = arguments(layer.twin)[layer.data]
        plain = layer.convolution and layer.ungrouped and not arguments(layer.node)["transposed"]
        return node if plain else None

    def _by_channels(
        self, layer: Layer, equations: Equations, rows: Rows, pairs: list[Pair], w: Tensor, b: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The original's weights on the best guess of its input channels from the small model's, the same
        guess for all taps.
        """
        node = self._inputs(layer)
        assert node is not None
        big = self.recording.big.tensors[layer.weight.name].detach()
        whole = self.kept_entries.slot(
            layer.weight.name, big, 0
        ).double()  # [outputs that stay, inputs, *kernel]
        sums = Normal(1, equations.channels, whole.shape[1], whole.device)
        for pair in pairs:
            if not pair.held:
                given: Any = arguments(twin(layer.node, pairs[0].small, pair.small))[layer.data]
                x, y = (value.movedim(1, -1).flatten(0, -2) for value in (
                    pair.small.value(given), pair.big.value(twin(node, pairs[0].big, pair.big)),
                ))  # fmt: skip
                picked = self.sample.some(len(x), len(pairs)).to(x.device)
                sums.add(x[picked][None], y[picked][None], torch.ones(len(picked)))
        nothing = torch.zeros(1, equations.channels, whole.shape[1], dtype=torch.float64, device=whole.device)
        for ridge in self.ridges:
            guess, _ = sums.solve(nothing, nothing[:, 0], ridge, True)
            new = equations.matrix(torch.einsum("oi...,ci->oc...", whole, guess[0]))
            yield new, b + rows.offset(new, b) if layer.bias else b

    def _candidates(
        self, layer: Layer, learned: Normal, w: Tensor, b: Tensor
    ) -> Iterable[tuple[Tensor, Tensor]]:
        if self.how == "refit":
            return (learned.solve(w, b, ridge, bool(layer.bias)) for ridge in self.ridges)
        if not layer.bias:
            return ()
        return [(w, learned.constant(w, b))] if self.how == "means" else [learned.scaled(w, b)]

    def _comparable(self, layer: Layer, pair: Pair, first: Pair) -> bool:
        """Whether the small model's result has the original's rows: a run that takes decisions may give
        others.
        """
        big = spec(twin(layer.target, first.big, pair.big)).shape
        small = spec(twin(layer.node if layer.sum is None else layer.sum, first.small, pair.small)).shape
        dims = self.kept_entries.dims(layer.target)
        return len(big) == len(small) and all(
            a == b for d, (a, b) in enumerate(zip(big, small, strict=True)) if d not in dims
        )

    def wanted(self, layer: Layer, pair: Pair, first: Pair, more: float = 0.0) -> Tensor:
        """What the product should give, if `more` were added to what the original gives."""
        found = self.kept_entries(layer.target, pair.big.value(twin(layer.target, first.big, pair.big)))
        if layer in self.aims:
            found = self.aims[layer](found, pair)
        return pulled(layer, first.small, pair.small, found + more if more else found)

    def _constant(self, layer: Layer, shape: tuple[int, int]) -> Tensor:
        """The constant as it is now."""
        if not layer.bias or layer.norm:
            return torch.zeros(
                shape, dtype=torch.float64, device=self.recording.small.tensors[layer.weight.name].device
            )
        return self.recording.small.tensors[layer.bias].double().reshape(shape)

    def _write(self, layer: Layer, equations: Equations, w: Tensor, b: Tensor) -> None:
        tensors = self.recording.small.tensors
        weight = tensors[layer.weight.name]
        weight.copy_(equations.weight(w).to(weight.dtype))
        if layer.bias:
            held = tensors[layer.bias]
            flat = b.reshape(held.shape).to(held.dtype)
            held.copy_(held - flat if layer.norm else flat)
