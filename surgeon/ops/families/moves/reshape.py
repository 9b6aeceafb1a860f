"""Reshapes: dims that merge are composed, dims that are cut become grids. And ops that are reshapes in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgeon.ops import masks
from surgeon.ops.context import OpContext
from surgeon.ops.ids import Constraints, DimIds, ValueIds, varies
from surgeon.ops.masked_op import MaskedOp, refusal
from surgeon.ops.table import Family, Trait, op, op_name


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs (old dims, new dims) of a reshape with equal products, dims of size 1 left out; None if there are
    zero sizes.
    """
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    if 0 in old or 0 in new:
        return None
    pairs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = old[left[i]], new[right[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(left[i])
                a *= old[left[i]]
            else:
                j += 1
                outs.append(right[j])
                b *= new[right[j]]
        pairs.append((ins, outs))
        i, j = i + 1, j + 1
    return pairs


def reshape(constraints: Constraints, axes: ValueIds, old: tuple[int, ...], new: tuple[int, ...]) -> ValueIds:
    """Ids after `view(new)`: dims that merge are composed, dims that are cut become grids, the rest
    passes.

    Example: [2, 6] with ids 0, 1 and 2 ... 7 becomes [2, 2, 3]. The first dim passes; the second one is cut into
    rows 8, 9 and, for each row, columns 10, 11, 12 and 13, 14, 15.

    >>> constraints = Constraints()
    >>> axes = {0: constraints.new((2, 1)), 1: constraints.new((1, 6))}
    >>> {dim: ids.tolist() for dim, ids in sorted(reshape(constraints, axes, (2, 6), (2, 2, 3)).items())}
    {0: [[[0]], [[1]]], 1: [[[8], [9]]], 2: [[[10, 11, 12], [13, 14, 15]]]}
    """
    pairs = _segments(old, new)
    if pairs is None:
        constraints.freeze_all(axes, "a reshape of an empty tensor")
        return {}
    out: ValueIds = {}
    for ins, outs in pairs:
        here = [d for d in ins if d in axes]
        if not here:
            continue
        if len(ins) == 1:
            dim_ids: DimIds | None = axes[ins[0]]
        else:
            dim_ids = constraints.merge(axes, ins, old)
        assert dim_ids is not None
        moved = _regroup(dim_ids, pairs, old, new)
        if len(outs) == 1:
            out[outs[0]] = moved
        else:
            out.update(constraints.split(moved, outs))
    return out


def _regroup(
    dim_ids: DimIds, pairs: list[tuple[list[int], list[int]]], old: Sequence[int], new: Sequence[int]
) -> DimIds:
    """The same reshape on compressed ids: segments along which they vary are made full, the others stay
    1.
    """
    full, shape = list(dim_ids.shape), [1] * len(new)
    for ins, outs in pairs:
        if {dim_ids.shape[d] for d in ins} != {1}:
            for d in ins:
                full[d] = old[d]
            for d in outs:
                shape[d] = new[d]
    moved = np.broadcast_to(dim_ids, full).reshape(shape)
    for _, outs in pairs:  # compress dims that only repeat
        if len(outs) > 1:
            for d in outs:
                if moved.shape[d] > 1 and not varies(moved, d):
                    moved = np.take(moved, [0], axis=d)
    return moved


def view(ctx: OpContext) -> ValueIds:
    """Also where dims of size 1 come or go."""
    x = ctx["self"]
    return reshape(ctx.constraints, ctx.axes(x), ctx.shape(x), ctx.out)


def permuted(axes: ValueIds, order: list[int]) -> ValueIds:
    return {order.index(d): t.transpose(order) for d, t in axes.items()}


def shuffle(ctx: OpContext) -> ValueIds:
    """Written out as view, permute, view: that is what these ops are."""
    x, factor = ctx["self"], int(ctx["upscale_factor|downscale_factor|groups"])
    *batch, c, h, w = ctx.shape(x)
    n, name = len(batch), op_name(ctx.node)
    lead = list(range(n))
    if name.endswith("pixel_shuffle"):
        grid = (*batch, c // factor**2, factor, factor, h, w)
        order, fixed = [*lead, n, n + 3, n + 1, n + 4, n + 2], range(n + 1, n + 5)
    elif name.endswith("pixel_unshuffle"):
        grid = (*batch, c, h // factor, factor, w // factor, factor)
        order, fixed = [*lead, n, n + 2, n + 4, n + 1, n + 3], range(n + 1, n + 5)
    else:
        grid = (*batch, factor, c // factor, h, w)
        order, fixed = [*lead, n + 1, n, n + 2, n + 3], range(n, n + 1)
    axes = reshape(ctx.constraints, ctx.axes(x), ctx.shape(x), grid)
    axes = permuted(ctx.freeze(axes, fixed, f"the factor of {name} is a fixed number"), order)
    return reshape(ctx.constraints, axes, tuple(grid[i] for i in order), ctx.out)


def complex_parts(ctx: OpContext) -> ValueIds:
    """[..., 2] and [...] of complex numbers: the real and the imaginary part are two entries, both of which
    stay.
    """
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    if "real" in op_name(ctx.node):
        return {d: t[..., None] for d, t in ctx.axes(x).items()}
    axes = ctx.freeze(ctx.axes(x), [ndim - 1], "holds the real and the imaginary part")
    return {d: ctx.constraints.collapse(t, ndim - 1)[..., 0] for d, t in axes.items()}


# -- what is computed when entries are gone -----------------------------------------------------------------


def complex_absent(call: MaskedOp) -> Any:
    """[..., 2] and [...] of complex numbers."""
    mask, ndim = call.mask(call["self"]), call.data(call["self"]).dim()
    if "real" in call.name:
        return call.run(call.data), tuple(f.unsqueeze(-1) for f in mask)
    if masks.varies(mask, [ndim - 1]):
        raise refusal(call, "a real or an imaginary part was removed")
    return call.run(call.data), tuple(f.squeeze(-1) for f in mask)


_RESHAPES = {Trait.RESHAPES}

op(
    "view reshape _unsafe_view _reshape_alias view_copy",
    Family.MOVEMENT,
    ids=view,
    traits=_RESHAPES,
    alike="view",
)
op("flatten unflatten squeeze", Family.MOVEMENT, ids=view, traits=_RESHAPES)
op("unsqueeze", Family.MOVEMENT, ids=view, traits=_RESHAPES)
op("pixel_shuffle pixel_unshuffle channel_shuffle", Family.MOVEMENT, ids=shuffle)
op("view_as_real view_as_complex", Family.MOVEMENT, ids=complex_parts, absent=complex_absent)
