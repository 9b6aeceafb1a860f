"""Presence of values that are put side by side along a dim: a constant beside what lost channels loses them, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from surgeon.ops import masks
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.masks import Mask


def presences(call: MaskedOp, parts: Sequence[fx.Node], dim: int, ndim: int) -> dict[fx.Node, Mask]:
    """The masks of parts that an op puts side by side along `dim` of its result, which has `ndim` dims.

    Of a part that repeats one number along a dim, each entry goes with what it lies beside: the zeros before a
    causal sequence have as many channels as the sequence. If they had not, shapes would not fit.

    Args:
        parts: those of `ndim` - 1 dims are one entry along `dim`.
    """
    data = {part: _wide(call.data(part), ndim, dim) for part in parts}
    found = {part: [_wide(factor, ndim, dim) for factor in call.mask(part)] for part in parts}
    rows = [factor for own in found.values() for factor in own if factor.shape[dim] == 1]
    for part, own in found.items():
        for factor in rows:
            known = any(mask.shape[d] > 1 for mask in own for d in _along(factor))
            if not known and repeats(data[part], factor):
                own.append(factor)
    lost = {part: data[part].dim() - call.data(part).dim() for part in parts}
    return {part: masks.tidy(f.squeeze(dim) if lost[part] else f for f in own) for part, own in found.items()}


def _wide(tensor: Tensor, ndim: int, dim: int) -> Tensor:
    return tensor.unsqueeze(dim) if tensor.dim() == ndim - 1 else tensor


def _along(factor: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(factor.shape) if size > 1]


def repeats(data: Tensor, factor: Tensor) -> bool:
    """Whether a value repeats along all dims that a factor of a mask varies along."""
    along = _along(factor)
    if data.dim() != factor.dim() or any(data.shape[d] != factor.shape[d] for d in along):
        return False
    first = data
    for dim in along:
        first = first.narrow(dim, 0, 1)
    return bool(data.numel()) and torch.equal(first.expand_as(data), data)
