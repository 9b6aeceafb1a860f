"""Rows: a product as linear equations, y[g, r] = x[g, r] @ w[g], with one row for each sampled place of its output.

A convolution's row holds the patch that one output place sees (im2col); groups are equations of their own. A transposed
convolution is an ordinary one over its input with zeros between the entries and a flipped kernel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgeon.recovery.sites import Site
from surgeon.rules.registry import op_name


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a convolution reads its input, in spatial dims.

    Attributes:
        stuffing: zeros between entries plus one; 1 but for transposed convolutions.
        pads: (left, right) by dim; negative ones crop.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    stuffing: tuple[int, ...]
    groups: int
    transposed: bool

    @staticmethod
    def of(node: fx.Node, weight: Tensor) -> Layout:
        args: Any = node.args
        stride, padding, dilation, transposed, output_padding, groups = args[3:9]
        kernel = tuple(weight.shape[2:])
        dims = len(kernel)
        stride, padding, dilation, more = (tuple(v) * (dims // len(v)) for v in (stride, padding, dilation, output_padding))
        if not transposed:
            return Layout(kernel, stride, dilation, tuple((p, p) for p in padding), (1,) * dims, groups, False)
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        pads = tuple((r, r + o) for r, o in zip(reach, more, strict=True))
        return Layout(kernel, (1,) * dims, dilation, pads, stride, groups, True)

    def windows(self, x: Tensor) -> Tensor:
        """A view [N, C, *places, *kernel] of an input [N, C, *space], padded."""
        if any(s > 1 for s in self.stuffing):
            sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.stuffing, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *sizes)
            every: Any = (..., *(slice(None, None, s) for s in self.stuffing))
            wide[every] = x
            x = wide
        x = F.pad(x, [side for pads in reversed(self.pads) for side in pads])
        for dim, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, (k - 1) * d + 1, s)[..., ::d]
        return x


class Equations:
    """The equations of one site: which rows, and how the weight is a matrix."""

    def __init__(self, site: Site, weight: Tensor) -> None:
        self.site = site
        self.shape = tuple(weight.shape)
        self.layout = Layout.of(site.node, weight) if site.convolution else None
        self.batched = op_name(site.node) in ("bmm", "baddbmm")

    def matrix(self, weight: Tensor) -> Tensor:
        """[groups, unknowns, outputs] of a weight as stored."""
        if self.layout is None:
            read = self.site.weight.read(weight)
            if op_name(self.site.node) == "linear":
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
            if op_name(self.site.node) == "linear":
                found = found.t()
            return self.site.weight.write(found)
        groups = self.layout.groups
        if self.layout.transposed:
            split = matrix.transpose(1, 2).reshape(groups, matrix.shape[2], self.shape[0] // groups, *self.layout.kernel)
            return split.transpose(1, 2).flip(list(range(3, split.dim()))).reshape(self.shape)
        return matrix.transpose(1, 2).reshape(self.shape)

    def unknowns(self) -> int:
        """Weights of one output."""
        if self.layout is None:
            sizes = self.site.weight.read(torch.empty(self.shape, device="meta")).shape
            return sizes[-1] if op_name(self.site.node) == "linear" else sizes[-2]
        inputs = self.shape[0] // self.layout.groups if self.layout.transposed else self.shape[1]
        return inputs * math.prod(self.layout.kernel)

    def places(self, y: Tensor) -> int:
        """Rows that one result has."""
        if self.layout is not None:
            return len(y) * math.prod(y.shape[2:])
        return y.shape[1] if self.batched else math.prod(y.shape[:-1])

    def rows(self, x: Tensor, y: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        """x [groups, rows, unknowns] and y [groups, rows, outputs] of an input and a result, at the picked places."""
        if self.layout is None:
            if self.batched:
                return x[:, picked], y[:, picked]
            return x.flatten(0, -2)[picked][None], y.flatten(0, -2)[picked][None]
        sample, rest = picked // math.prod(y.shape[2:]), picked % math.prod(y.shape[2:])
        place = torch.unravel_index(rest, tuple(y.shape[2:]))
        seen = self.layout.windows(x)
        dims = len(self.layout.kernel)
        seen = seen.movedim(1, dims + 1)[(sample, *place)]  # [rows, C, *kernel]
        given = y.movedim(1, -1)[(sample, *place)]  # [rows, O]
        groups = self.layout.groups
        return (
            seen.reshape(len(picked), groups, -1).transpose(0, 1),
            given.reshape(len(picked), groups, -1).transpose(0, 1),
        )
