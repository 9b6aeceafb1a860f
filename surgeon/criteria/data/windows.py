"""Windows: the patch of its input that each place of a convolution's result sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from surgeon.graph.arguments import arguments


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
        """The layout of a recorded convolution with this weight."""
        given = arguments(node)
        groups, transposed = int(given["groups"]), bool(given["transposed"])
        kernel = tuple(weight.shape[2:])
        dims = len(kernel)
        stride, padding, dilation, more = (
            tuple(v) * (dims // len(v))
            for v in map(given.__getitem__, ("stride", "padding", "dilation", "output_padding"))
        )
        if not transposed:
            return Layout(
                kernel, stride, dilation, tuple((p, p) for p in padding), (1,) * dims, groups, False
            )
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
