"""Rows: a product as linear equations, y[g, r] = x[g, r] @ w[g], with one row for each sampled place of its
output.

A convolution's row holds the patch that one output place sees (im2col); groups are equations of their own. A
transposed convolution is an ordinary one over its input with zeros between the entries and a flipped kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgeon.criteria.data.windows import Layout
from surgeon.recovery.layers import Layer


class Equations:
    """The equations of one layer: which rows, and how the weight is a matrix."""

    def __init__(self, layer: Layer, weight: Tensor) -> None:
        self.layer = layer
        self.shape = tuple(weight.shape)
        self.layout = Layout.of(layer.node, weight) if layer.convolution else None
        self.batched = layer.batched

    def matrix(self, weight: Tensor) -> Tensor:
        """[groups, unknowns, outputs] of a weight as stored."""
        if self.layout is None:
            read = self.layer.weight.read(weight)
            if self.layer.rows_first:
                read = read.t()
            return read if self.batched else read[None]
        groups = self.layout.groups
        if self.layout.transposed:  # [I, O / g, taps]
            split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            return split.flip(list(range(3, split.dim()))).transpose(1, 2).flatten(2).transpose(1, 2)
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight as stored, of a matrix."""
        if self.layout is None:
            found = matrix if self.batched else matrix[0]
            if self.layer.rows_first:
                found = found.t()
            return self.layer.weight.write(found)
        groups = self.layout.groups
        if self.layout.transposed:
            split = matrix.transpose(1, 2).reshape(
                groups, matrix.shape[2], self.shape[0] // groups, *self.layout.kernel
            )
            return split.transpose(1, 2).flip(list(range(3, split.dim()))).reshape(self.shape)
        return matrix.transpose(1, 2).reshape(self.shape)

    def unknowns(self) -> int:
        """Weights of one output."""
        if self.layout is None:
            sizes = self.layer.weight.read(torch.empty(self.shape, device="meta")).shape
            return sizes[-1] if self.layer.rows_first else sizes[-2]
        inputs = self.shape[0] // self.layout.groups if self.layout.transposed else self.shape[1]
        return inputs * math.prod(self.layout.kernel)

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.unknowns() // (math.prod(self.layout.kernel) if self.layout is not None else 1)

    def places(self, y: Tensor) -> int:
        """Rows that one result has."""
        if self.layout is not None:
            return len(y) * math.prod(y.shape[2:])
        return y.shape[1] if self.batched else math.prod(y.shape[:-1])

    def rows(self, x: Tensor, y: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        """x [groups, rows, unknowns] and y [groups, rows, outputs] of an input and a result, at the picked
        places.
        """
        if self.layout is None:
            return x[:, picked] if self.batched else x.flatten(0, -2)[picked][None], self.given(y, picked)
        seen = self.layout.windows(x)
        dims = len(self.layout.kernel)
        seen = seen.movedim(1, dims + 1)[self._place(y, picked)]  # [rows, C, *kernel]
        return seen.reshape(len(picked), self.layout.groups, -1).transpose(0, 1), self.given(y, picked)

    def given(self, y: Tensor, picked: Tensor) -> Tensor:
        """[groups, rows, outputs] of a result at the picked places."""
        if self.layout is None:
            return y[:, picked] if self.batched else y.flatten(0, -2)[picked][None]
        return (
            y.movedim(1, -1)[self._place(y, picked)]
            .reshape(len(picked), self.layout.groups, -1)
            .transpose(0, 1)
        )

    def _place(self, y: Tensor, picked: Tensor) -> tuple[Tensor, ...]:
        """Sample and place in it, of the picked places of a convolution's result."""
        assert self.layout is not None
        return torch.unravel_index(picked, (len(y), *y.shape[2:]))

    def sensitivity(self, squares: Tensor, picked: Tensor) -> Tensor:
        """[rows]: how much the outputs feel the picked places, from the squared gradients of a result."""
        return self.given(squares, picked).sum((0, 2))
