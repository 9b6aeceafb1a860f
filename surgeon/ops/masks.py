"""Which entries of a value are present: the arithmetic of masks that the proof is made of.

A mask is a tuple of boolean factors, each broadcastable to the value's shape; an entry is present if every
factor says so. The empty tuple means that all are present. Factors stay compressed: size 1 along dims where
they are constant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Mask = tuple[Tensor, ...]


def compress(factor: Tensor, exact: bool) -> Tensor:
    """Make dims of size 1 where the factor only repeats; `exact` also compares entries, not only strides."""
    for dim in range(factor.dim()):
        if factor.shape[dim] > 1 and factor.stride(dim) == 0:
            factor = factor.narrow(dim, 0, 1)
    if exact:
        for dim in range(factor.dim()):
            if factor.shape[dim] > 1 and bool((factor == factor.narrow(dim, 0, 1)).all()):
                factor = factor.narrow(dim, 0, 1)
    return factor


def moved(mask: Mask, shape: Sequence[int], op: Callable[[Tensor], Any], exact: bool) -> Mask:
    """The mask after a movement op; `op` takes and returns a tensor of the value's (new) shape."""
    return tidy(compress(op(factor.expand(shape)), exact) for factor in mask)


def tidy(factors: Iterable[Tensor]) -> Mask:
    """Drop factors that say nothing and copies of one."""
    kept: list[Tensor] = []
    for factor in factors:
        if bool(factor.all()):
            continue
        if not any(f.shape == factor.shape and torch.equal(f, factor) for f in kept):
            kept.append(factor)
    return tuple(kept)


def aligned(mask: Mask, ndim: int) -> Mask:
    """The factors with as many dims as the value that they are broadcast to."""
    return tuple(f.reshape((1,) * (ndim - f.dim()) + tuple(f.shape)) for f in mask)


def full(mask: Mask, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """One boolean tensor of the value's shape."""
    result = torch.ones((), dtype=torch.bool, device=device)
    for factor in mask:
        result = result & factor
    return result.expand(shape)


def varies(mask: Mask, dims: Iterable[int]) -> bool:
    """Whether presence differs along any of the dims."""
    dims = list(dims)
    return any(f.shape[d] > 1 for f in mask for d in dims)


def any_along(mask: Mask, dims: Sequence[int], keepdim: bool = True) -> Mask:
    """Present where any entry along `dims` is."""
    inside = [f for f in mask if any(f.shape[d] > 1 for d in dims)]
    result = [f for f in mask if all(f.shape[d] == 1 for d in dims)]
    if inside:
        both = inside[0]
        for factor in inside[1:]:
            both = both & factor
        result.append(both.any(dim=tuple(dims), keepdim=True))
    if not keepdim:
        result = [f.squeeze(tuple(dims)) for f in result]
    return tidy(result)


def any_of_groups(mask: Mask, dim: int, groups: int, size: int) -> Mask:
    """`any_along(dim)` within each of the groups that the dim is cut into; a dim of that size again, cut into
    as many.
    """
    inside = [f for f in mask if f.shape[dim] > 1]
    if groups == 1 or not inside:
        return any_along(mask, [dim])
    both = functools.reduce(torch.logical_and, inside).unflatten(dim, (groups, -1))
    found = both.any(dim=dim + 1).repeat_interleave(size // groups, dim=dim)
    return tidy([*(f for f in mask if f.shape[dim] == 1), found])


def known_zeroed(data: Tensor) -> Tensor:
    """Say of a tensor object that it holds 0 in every absent entry."""
    data.absent_is_zero = True  # type: ignore[attr-defined]
    return data


def is_zeroed(data: Any) -> bool:
    return getattr(data, "absent_is_zero", False)


def zeroed(data: Tensor, mask: Mask) -> Tensor:
    """The value with 0 in every absent entry."""
    if is_zeroed(data):
        return data
    for factor in mask:
        data = torch.where(factor, data, torch.zeros((), dtype=data.dtype, device=data.device))
    return data


def counted(mask: Mask, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """How many entries are present along `dims` (kept as size 1), at least 1."""
    present = full(mask, shape) if mask else torch.ones(tuple(shape), dtype=torch.bool)
    return present.sum(dim=tuple(dims), keepdim=True).clamp_min(1)
