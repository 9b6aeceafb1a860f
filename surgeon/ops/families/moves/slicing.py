"""Parts of a tensor found by number: cut out, put in, padded.

A number in the code that picks one entry keeps its dim whole; a cut into parts keeps the parts even where the code halves
what it finds, and lets unequal parts go their own way (their sizes are mended).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.ops import masks
from surgeon.ops.context import OpContext, beside, broadcast
from surgeon.ops.families.moves.movement import joined, viewed
from surgeon.ops.ids import Constraints, ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.table import Family, Trait, op

_MOST_PARTS = 4  # that a slice is taken for one of


def sliced(
    constraints: Constraints, axes: ValueIds, dim: int, start: int, stop: int, step: int = 1
) -> ValueIds:
    """Ids of x[..., start:stop:step, ...] along `dim`.

    The slice starts and ends at one place in every row, so the rows lose equally many of the entries before it,
    in it, and behind it.
    """
    index = slice(start, stop, step)
    for part in (slice(0, start), slice(start, stop), slice(stop, None)) if dim in axes else ():
        constraints.even(axes[dim][(slice(None),) * dim + (part,)], dim)
    return {
        d: (t if t.shape[dim] == 1 and d != dim else t[(slice(None),) * dim + (index,)])
        for d, t in axes.items()
    }


def _even_parts(ctx: OpContext, axes: ValueIds, dim: int, size: int, parts: int) -> None:
    """A dim that is cut into equal parts: each part keeps equally many (the code that cuts it halves what it
    finds).
    """
    dim_ids = axes.get(dim)
    if dim_ids is not None and parts > 1 and size > 1:
        moved = np.moveaxis(dim_ids, dim, -1)
        ctx.constraints.balance(moved.reshape(*moved.shape[:-1], parts, size), moved.ndim)


def slice_(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    shape = ctx.shape(x)
    dim, start, stop, step = normal_slice(ctx, shape)
    axes, size = ctx.axes(x), shape[dim]
    if dim in axes and step > 1:
        if size % step:
            axes = ctx.freeze(axes, [dim], "is sliced with a step")
        else:  # every block of `step` entries goes as one
            moved = np.moveaxis(axes[dim], dim, -1)
            blocks = moved.reshape(*moved.shape[:-1], size // step, step)
            ctx.constraints.collapse(blocks, blocks.ndim - 1)
    length = stop - start
    if dim in axes and step == 1 and _is_even(start, stop, size):
        _even_parts(ctx, axes, dim, length, size // length)
    return _single(ctx, sliced(ctx.constraints, axes, dim, start, stop, step), dim, length)


def _is_even(start: int, stop: int, size: int) -> bool:
    """Whether a slice is one of a few equal parts of a dim."""
    length = stop - start
    return 0 < length < size and size % length == 0 and size // length <= _MOST_PARTS and start % length == 0


def _single(ctx: OpContext, axes: ValueIds, dim: int, length: int) -> ValueIds:
    """A part of one entry stays: without it the part would be empty, and what it is broadcast to with it."""
    return ctx.freeze(axes, [dim], "is a part of a single entry") if length == 1 else axes


def normal_slice(ctx: OpContext, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(dim, start, stop, step) of a slice op, all of them plain and within the dim."""
    dim = int(ctx["dim"]) % len(shape)
    step = int(ctx["step"])
    start, stop, _ = slice(ctx["start"], ctx["end"], step).indices(shape[dim])
    return dim, start, max(start, stop), step


def select(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    ndim = len(ctx.shape(x))
    dim = int(ctx["dim"]) % ndim
    index = int(ctx["index"])
    if not ctx.node.users and index in (
        0,
        -1,
    ):  # the code only asks for its shape, and every size has such an entry
        return _picked({d: t for d, t in ctx.axes(x).items() if d != dim}, dim, index)
    axes = ctx.freeze(ctx.axes(x), [dim], "one entry of it is picked by number")
    return _picked(axes, dim, index % ctx.shape(x)[dim])


def _picked(axes: ValueIds, dim: int, index: int) -> ValueIds:
    return {d - (d > dim): np.take(t, index if t.shape[dim] > 1 else 0, axis=dim) for d, t in axes.items()}


def unbind(ctx: OpContext) -> tuple[ValueIds, ...]:
    x = ctx["self"]
    shape = ctx.shape(x)
    dim = int(ctx["dim"]) % len(shape)
    axes = ctx.freeze(ctx.axes(x), [dim], "it is unbound into a fixed number of tensors")
    return tuple(_picked(axes, dim, i) for i in range(shape[dim]))


def split(ctx: OpContext) -> tuple[ValueIds, ...]:
    """Parts of equal size keep equal sizes; parts of unequal size are independent."""
    x = ctx["self"]
    dim = int(ctx["dim"]) % len(ctx.shape(x))
    sizes = [spec.shape[dim] for spec in ctx.node.meta["spec"]]
    axes = ctx.axes(x)
    if len(set(sizes)) == 1:
        _even_parts(ctx, axes, dim, sizes[0], len(sizes))
    ends = np.cumsum(sizes)
    parts = zip(sizes, ends, strict=True)
    return tuple(
        _single(ctx, sliced(ctx.constraints, axes, dim, int(end) - size, int(end)), dim, size)
        for size, end in parts
    )


def gated_linear_unit(ctx: OpContext) -> ValueIds:
    """First half times the sigmoid of the second: two slices that meet."""
    x = ctx["self"]
    shape = ctx.shape(x)
    dim = int(ctx["dim"]) % len(shape)
    half = shape[dim] // 2
    parts = [sliced(ctx.constraints, ctx.axes(x), dim, start, start + half) for start in (0, half)]
    return broadcast(ctx, [(part, ctx.out) for part in parts], ctx.out)


def slice_scatter(ctx: OpContext) -> ValueIds:
    base, child = ctx["self"], ctx["src"]
    dim, start, stop, step = normal_slice(ctx, ctx.shape(base))
    return _scattered(ctx, base, child, dim, start, stop, step)


def _scattered(
    ctx: OpContext, base: fx.Node, child: fx.Node, dim: int, start: int, stop: int, step: int
) -> ValueIds:
    axes, inner = dict(ctx.axes(base)), dict(ctx.axes(child))
    window = sliced(ctx.constraints, axes, dim, start, stop, step)
    for d in set(axes) | set(inner):
        if d in window and d in inner:
            written = beside(ctx.constraints, [window[d], inner[d]])
            if axes[d].shape[dim] == 1:
                axes[d] = ctx.constraints.collapse(written, dim)  # as the base, it does not vary there
            elif ctx.constraints.is_unowned(written).any():
                rows = np.broadcast_shapes(
                    *(tuple(1 if j == dim else n for j, n in enumerate(t.shape)) for t in (axes[d], written))
                )
                axes[d] = np.broadcast_to(
                    axes[d], [n if j != dim else axes[d].shape[dim] for j, n in enumerate(rows)]
                ).copy()
                axes[d][(slice(None),) * dim + (slice(start, stop, step),)] = written
        elif ctx.shape(child)[d] > 1:
            for side in (axes, inner):
                if d in side:
                    ctx.constraints.freeze(side.pop(d), "meets a tensor whose size here is fixed")
    return {d: t for d, t in axes.items() if d in window}


def select_scatter(ctx: OpContext) -> ValueIds:
    base, child = ctx["self"], ctx["src"]
    ndim = len(ctx.shape(base))
    dim = int(ctx["dim"]) % ndim
    axes = ctx.freeze(ctx.axes(base), [dim], "one entry of it is written by number")
    inner = {d + (d >= dim): np.expand_dims(t, dim) for d, t in ctx.axes(child).items()}
    for d in (set(axes) | set(inner)) - {dim}:
        if d in axes and d in inner:
            axes[d] = beside(ctx.constraints, [axes[d], inner[d]])
        elif ctx.out[d] > 1:
            for side in (axes, inner):
                if d in side:
                    ctx.constraints.freeze(side.pop(d), "meets a tensor whose size here is fixed")
    return axes


def constant_pad(ctx: OpContext) -> ValueIds:
    """No parameter owns the entries that padding adds: each is removed with whatever it is joined to."""
    x, pads = ctx["self"], list(ctx["pad"])
    ndim, shape = len(ctx.out), ctx.shape(x)
    axes = dict(ctx.axes(x))
    for i in range(len(pads) // 2):
        dim, (before, after) = ndim - 1 - i, pads[2 * i : 2 * i + 2]
        if not before and not after:
            continue
        low, high = max(0, -before), shape[dim] - max(0, -after)
        axes = sliced(ctx.constraints, axes, dim, low, high)
        for d, dim_ids in list(axes.items()):
            if dim_ids.shape[dim] == 1 and d != dim:
                continue
            if d != dim:  # rows of another dim's ids: the new rows are unowned as well
                ctx.constraints.freeze(axes.pop(d), "is padded along its rows")
                continue
            edges = []
            for width in (before, after):  # as wide in every row, so the same ids in all of them
                edge = ctx.constraints.new(max(0, width))
                ctx.constraints.mark_unowned(edge)
                wide = edge.reshape([-1 if j == dim else 1 for j in range(ndim)])
                edges.append(
                    np.broadcast_to(wide, (*dim_ids.shape[:dim], edge.size, *dim_ids.shape[dim + 1 :]))
                )
            axes[d] = np.concatenate([edges[0], dim_ids, edges[1]], axis=dim)
    return axes


# -- what is computed when entries are gone -----------------------------------------------------------------


def gated_absent(call: MaskedOp) -> Any:
    data, mask = call.values[call["self"]]
    dim = call["dim"] % data.dim()
    first = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[0], exact=True)
    second = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[1], exact=True)
    return call.run(call.data), masks.tidy([*first, *second])


def padded(call: MaskedOp) -> Any:
    factors = (_padded(factor, call["pad"]) for factor in call.mask(call["self"]))
    return call.run(call.data), masks.tidy(factors)


def _padded(factor: Tensor, pads: list[int]) -> Tensor:
    """What padding adds belongs to no tensor: present, unless it lies in a row that is absent or meets something
    absent later.
    """
    own = list(pads)
    for i in range(len(own) // 2):
        if factor.shape[factor.dim() - 1 - i] == 1:
            own[2 * i] = own[2 * i + 1] = 0
    padded: Tensor = torch.ops.aten.constant_pad_nd.default(factor, own, 1)
    return padded


op("slice", Family.MOVEMENT, ids=slice_, absent=viewed, traits={Trait.SLICES})
op("select", Family.MOVEMENT, ids=select, absent=viewed)
op("unbind", Family.MOVEMENT, ids=unbind)
op("split unsafe_split", Family.MOVEMENT, ids=split, alike="split")
op("split_with_sizes split_with_sizes_copy chunk unsafe_chunk", Family.MOVEMENT, ids=split)
op("glu", Family.ELEMENTWISE, ids=gated_linear_unit, absent=gated_absent)
op("slice_scatter", Family.MOVEMENT, ids=slice_scatter, absent=joined)
op("select_scatter", Family.MOVEMENT, ids=select_scatter, absent=joined)
op("constant_pad_nd", Family.MOVEMENT, ids=constant_pad, absent=padded)
