"""Rows: the equations of one layer, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.arguments import arguments
from surgeon.recovery.layers import Layer
from surgeon.recovery.linear.equations import Equations
from surgeon.recovery.linear.least_squares import Normal
from surgeon.recovery.row_sampling import RowSample
from surgeon.recovery.runs.paired_run import twin
from surgeon.recovery.runs.recording import Pair


class Rows:
    """The equations of one layer, batch by batch.

    Args:
        sample: which rows to look at, and how each is weighted.
        wanted: what the layer's product should give: (pair of runs, what is added to the original's result).

    Attributes:
        scale: [groups, outputs], how much an error of each output weighs where it is compared (the square of
            what is between); 0 for outputs that cannot be fitted.
    """

    def __init__(
        self,
        layer: Layer,
        equations: Equations,
        pairs: list[Pair],
        sample: RowSample,
        wanted: Callable[[Pair, float], Tensor],
    ) -> None:
        self.layer, self.equations, self.pairs, self.wanted = layer, equations, pairs, wanted
        self.picked, self.weights = sample.picked[layer], sample.weights[layer]
        self.scale = self._scale()

    def _scale(self) -> Tensor:
        """From the result of adding 1 to what is wanted: all that is between is affine."""
        low, high = (self._of(0, more)[1][:, 0].double() for more in (0.0, 1.0))
        scale = (high - low).square().reciprocal()
        for number in range(len(self.pairs) if self.layer.path else 0):
            scale[~torch.isfinite(self._of(number)[1]).all(1)] = 0
        return scale

    def _node(self, pair: Pair) -> fx.Node:
        return twin(self.layer.node, self.pairs[0].small, pair.small)

    def _data(self, pair: Pair) -> fx.Node:
        found: Any = arguments(self._node(pair))[self.layer.data]
        given: fx.Node = found
        return given

    def _of(self, number: int, more: float = 0.0) -> tuple[Tensor, Tensor]:
        pair = self.pairs[number]
        wanted = self.wanted(pair, more)
        value = pair.small.value(self._data(pair))
        return self.equations.rows(value, wanted, self.picked[number].to(value.device))

    def of(self, held: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x [groups, rows, unknowns], y [groups, rows, outputs], weights [rows] of the batches to judge by,
        or to learn from.
        """
        for number, pair in enumerate(self.pairs):
            if pair.held == held:
                x, y = self._of(number)
                yield x, y.masked_fill((self.scale == 0)[:, None], 0), self.weights[number].to(x.device)

    def count(self, held: bool) -> int:
        return sum(
            len(picked) for picked, pair in zip(self.picked, self.pairs, strict=True) if pair.held == held
        )

    def normal(self, held: bool) -> Normal:
        groups, unknowns, outputs = self._shape
        sums = Normal(groups, unknowns, outputs, self.scale.device)
        for x, y, weights in self.of(held):
            sums.add(x, y, weights)
        return sums

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.scale.shape[0], self.equations.unknowns(), self.scale.shape[1]

    def error(self, w: Tensor, b: Tensor) -> Tensor:
        """Mean squared error on the batches to judge by, [groups, outputs], without normal equations."""
        return self._mean(True, lambda x, y: (x.double() @ w + b[:, None] - y.double()).square())

    def offset(self, w: Tensor, b: Tensor) -> Tensor:
        """What x @ w + b lacks in the mean, on the batches to learn from."""
        return self._mean(False, lambda x, y: y.double() - x.double() @ w - b[:, None])

    def _mean(self, held: bool, what: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Over weighted rows, [groups, outputs]."""
        total, weight = torch.zeros_like(self.scale), 0.0
        for x, y, weights in self.of(held):
            total += (what(x, y) * weights[:, None]).sum(1)
            weight += float(weights.sum())
        return total / (weight or 1)
