"""Movement that picks, cuts or writes parts: the output holds some entries of the input, found by position.

A number in the code that picks one entry keeps its dim whole; a cut into parts keeps the parts even where the
code halves what it finds, and lets unequal parts go their own way (their sizes are mended).
"""

from __future__ import annotations

import numpy as np
from torch import fx

from surgeon.ops.ids import Constraints, ValueIds
from surgeon.ops.table import Family, OpContext, beside, broadcast, op_name, rule

_MOST_PARTS = 4  # that a slice is taken for one of


def sliced(
    constraints: Constraints, axes: ValueIds, dim: int, start: int, stop: int, step: int = 1
) -> ValueIds:
    """Tracks of x[..., start:stop:step, ...] along `dim`.

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
    track = axes.get(dim)
    if track is not None and parts > 1 and size > 1:
        moved = np.moveaxis(track, dim, -1)
        ctx.constraints.balance(moved.reshape(*moved.shape[:-1], parts, size), moved.ndim)


@rule(Family.MOVEMENT, "slice")
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


@rule(Family.MOVEMENT, "select")
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


@rule(Family.MOVEMENT, "unbind")
def unbind(ctx: OpContext) -> tuple[ValueIds, ...]:
    x = ctx["self"]
    shape = ctx.shape(x)
    dim = int(ctx["dim"]) % len(shape)
    axes = ctx.freeze(ctx.axes(x), [dim], "it is unbound into a fixed number of tensors")
    return tuple(_picked(axes, dim, i) for i in range(shape[dim]))


@rule(
    Family.MOVEMENT,
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "unsafe_split",
    "split_with_sizes_copy",
)
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


@rule(Family.ELEMENTWISE, "glu")
def gated_linear_unit(ctx: OpContext) -> ValueIds:
    """First half times the sigmoid of the second: two slices that meet."""
    x = ctx["self"]
    shape = ctx.shape(x)
    dim = int(ctx["dim"]) % len(shape)
    half = shape[dim] // 2
    parts = [sliced(ctx.constraints, ctx.axes(x), dim, start, start + half) for start in (0, half)]
    return broadcast(ctx, [(part, ctx.out) for part in parts], ctx.out)


@rule(Family.MOVEMENT, "slice_scatter")
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
                axes[d] = written
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


@rule(Family.MOVEMENT, "select_scatter")
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


@rule(Family.MOVEMENT, "constant_pad_nd")
def constant_pad(ctx: OpContext) -> ValueIds:
    """Entries that padding adds belong to nobody: they get ids of no slot and follow what they meet."""
    x, pads = ctx["self"], list(ctx["pad"])
    ndim, shape = len(ctx.out), ctx.shape(x)
    axes = dict(ctx.axes(x))
    for i in range(len(pads) // 2):
        dim, (before, after) = ndim - 1 - i, pads[2 * i : 2 * i + 2]
        if not before and not after:
            continue
        low, high = max(0, -before), shape[dim] - max(0, -after)
        axes = sliced(ctx.constraints, axes, dim, low, high)
        for d, track in list(axes.items()):
            if track.shape[dim] == 1 and d != dim:
                continue
            if d != dim:  # rows of another dim's track: the new rows are nobody's either
                ctx.constraints.freeze(axes.pop(d), "is padded along its rows")
                continue
            edges = []
            for width in (before, after):  # as wide in every row, so the same ids in all of them
                edge = ctx.constraints.new(max(0, width))
                ctx.constraints.mark_unowned(edge)
                wide = edge.reshape([-1 if j == dim else 1 for j in range(ndim)])
                edges.append(np.broadcast_to(wide, (*track.shape[:dim], edge.size, *track.shape[dim + 1 :])))
            axes[d] = np.concatenate([edges[0], track, edges[1]], axis=dim)
    return axes


@rule(Family.MOVEMENT, "index", "_unsafe_index", "index_select", "gather")
def index(ctx: OpContext) -> ValueIds:
    """Entries picked by index tensors: the picked dims stay whole, the others pass."""
    x = ctx["self"]
    shape, name = ctx.shape(x), op_name(ctx.node)
    reason = "is looked up by index"
    if name == "gather":
        return _gathered(ctx, reason)
    for tensor in ctx.tensors[1:]:
        ctx.constraints.freeze_all(ctx.axes(tensor), "is used as an index")
    if not name.endswith("index"):
        dim = int(ctx["dim"]) % len(shape)
        axes = ctx.freeze(ctx.axes(x), [dim], reason)
        return {d: ctx.constraints.collapse(t, dim) for d, t in axes.items()}
    indices = [(d, i) for d, i in enumerate(ctx["indices"]) if i is not None]
    picked = [d for d, _ in indices]
    if not picked:
        return dict(ctx.axes(x))
    axes = ctx.freeze(ctx.axes(x), picked, reason)
    for d in picked:
        axes = {k: ctx.constraints.collapse(t, d) for k, t in axes.items()}
    width = max(len(ctx.shape(i)) for _, i in indices)
    masks = any(str(i.meta["spec"].dtype) in ("torch.bool", "torch.uint8") for _, i in indices)
    if masks:
        ctx.freeze(axes, range(len(shape)), "is masked by a boolean index")
        return {}
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    place = picked[0] if adjacent else 0
    out: ValueIds = {}
    for d, t in axes.items():
        rest = [n for i, n in enumerate(t.shape) if i not in picked]
        position = d - sum(p < d for p in picked)
        new = rest[:place] + [1] * width + rest[place:]
        out[position if position < place else position + width] = t.reshape(new)
    return out


def _gathered(ctx: OpContext, reason: str) -> ValueIds:
    """x[.., index[.., k], k]: where the index is one that was repeated as often as the code found a width,
    the two meet.
    """
    x, index = ctx["self"], ctx["index"]
    dim = int(ctx["dim"]) % max(len(ctx.out), 1)
    own, other = ctx.axes(x), ctx.axes(index)
    meet = [
        d
        for d in index.meta.get("repeated", {})
        if d != dim and d in own and d in other and ctx.shape(x)[d] == ctx.out[d]
    ]
    ctx.freeze(own, set(own) - set(meet), reason)
    ctx.freeze(other, set(other) - set(meet), "is used as an index")
    for d in (d for d, size in enumerate(ctx.shape(x)) if d == dim or size != ctx.out[d]):
        own = {k: ctx.constraints.collapse(t, d) for k, t in own.items() if k != d}
    return {d: beside(ctx.constraints, [own[d], other[d]]) for d in meet}


@rule(Family.MOVEMENT, "unfold", mixes=lambda c: {"self": [c["dimension"]]})
def unfold_dim(ctx: OpContext) -> ValueIds:
    """Sliding windows along one dim: that dim stays whole."""
    x = ctx["self"]
    dim = int(ctx["dimension"]) % max(1, len(ctx.shape(x)))
    axes = ctx.freeze(ctx.axes(x), [dim], "is unfolded into windows")
    return {d: t[..., None] for d, t in axes.items()}


@rule(Family.ELEMENTWISE, "index_add", "index_copy")
def index_add(ctx: OpContext) -> ValueIds:
    """Rows of source [.., n, ..] added to x at indices along one dim: that dim stays whole, the others
    meet.
    """
    x, index, source = ctx["self"], ctx["index"], ctx["source"]
    dim = int(ctx["dim"]) % max(1, len(ctx.out))
    ctx.constraints.freeze_all(ctx.axes(index), "is used as an index")
    operands = []
    for node in (x, source):
        axes = ctx.freeze(ctx.axes(node), [dim], "is written by index")
        axes = {d: ctx.constraints.collapse(t, dim) for d, t in axes.items()}
        operands.append((axes, tuple(1 if d == dim else n for d, n in enumerate(ctx.shape(node)))))
    return broadcast(ctx, operands, tuple(1 if d == dim else n for d, n in enumerate(ctx.out)))


@rule(Family.ELEMENTWISE, "scatter", "scatter_add", "scatter_reduce")
def scatter(ctx: OpContext) -> ValueIds:
    """Entries of source written to x, or summed there, at an index for each (graph layers): that dim stays,
    the others meet.
    """
    x, index, source = ctx["self"], ctx["index"], ctx["src|value"]
    dim = int(ctx["dim"]) % max(1, len(ctx.out))
    shapes = [[n for d, n in enumerate(ctx.shape(node)) if d != dim] for node in (x, index, source)]
    operands = []
    for node in (x, index, source):
        axes = ctx.freeze(
            ctx.axes(node),
            [dim] if shapes[0] == shapes[1] == shapes[2] else range(len(ctx.out)),
            "is written by index",
        )
        axes = {d: ctx.constraints.collapse(t, dim) for d, t in axes.items()}
        operands.append((axes, tuple(1 if d == dim else n for d, n in enumerate(ctx.out))))
    return broadcast(ctx, operands, operands[0][1])


@rule(Family.MOVEMENT, "index_put", "_unsafe_index_put")
def index_put(ctx: OpContext) -> ValueIds:
    """x with entries written by index or mask: the indexed dims stay whole, those behind them meet the
    values'.
    """
    x, indices, values = ctx["self"], ctx["indices"], ctx["values"]
    ndim, picked = len(ctx.out), list[int]()
    for place, tensor in enumerate(indices):
        if tensor is None:
            continue
        ctx.constraints.freeze_all(ctx.axes(tensor), "is used as an index")
        mask = str(tensor.meta["spec"].dtype) in ("torch.bool", "torch.uint8")
        picked += range(place, place + (len(ctx.shape(tensor)) if mask else 1))
    last = max(picked, default=-1)
    axes = ctx.freeze(ctx.axes(x), range(last + 1), "is written by index")
    for d in range(last + 1):
        axes = {k: ctx.constraints.collapse(t, d) for k, t in axes.items()}
    shape, value = ctx.shape(values), ctx.axes(values)
    behind = ndim - last - 1
    offset = ndim - len(shape)
    for d in range(max(0, len(shape) - behind)):
        ctx.freeze(value, [d], "is written by index")
    for d in range(last + 1, ndim):
        own, other = axes.get(d), value.get(d - offset)
        if own is not None and other is not None:
            flat = np.moveaxis(other, d - offset, -1).reshape(-1, other.shape[d - offset])
            axes[d] = ctx.constraints.collapse(np.concatenate([own.reshape(1, -1), flat]), 0).reshape(
                own.shape
            )
        elif d - offset >= 0 and shape[d - offset] > 1:
            for track in (axes.pop(d, None), other):
                if track is not None:
                    ctx.constraints.freeze(track, "meets a tensor whose size here is fixed")
    return axes
