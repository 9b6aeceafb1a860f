"""Movement: the output holds entries of the inputs in other places, so the same op runs on the ids.

Tracks are compressed (size 1 along dims where they are constant), so each rule runs its op on the dims that a
track varies along and only renumbers the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from surgeon.ops.factory import unowned_ids
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.reshape import reshape
from surgeon.ops.table import Family, OpContext, beside, op_name, opaque, rule, shift


@rule(Family.MOVEMENT, "getitem")
def getitem(ctx: OpContext) -> Any:
    source, index = ctx["arg0"], ctx["arg1"]
    axes: Any = ctx.axes(source)
    part: ValueIds = axes[index] if isinstance(axes, tuple) else {}
    return part


@rule(
    Family.MOVEMENT,
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "flatten",
    "unflatten",
    "unsafe_reshape",
    "view_copy",
)
def view(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    return reshape(ctx.constraints, ctx.axes(x), ctx.shape(x), ctx.out)


def permuted(axes: ValueIds, order: list[int]) -> ValueIds:
    return {order.index(d): t.transpose(order) for d, t in axes.items()}


@rule(Family.MOVEMENT, "permute", "t", "transpose", "numpy_T", "adjoint")
def permute(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    ndim = len(ctx.shape(x))
    name = op_name(ctx.node)
    order = list(range(ndim))
    if name.endswith("permute"):
        order = [int(d) % ndim for d in ctx["dims"]]
    elif ndim >= 2:
        a, b = (
            (ctx["dim0"] % ndim, ctx["dim1"] % ndim) if name.endswith("transpose") else (-2 % ndim, -1 % ndim)
        )
        order[a], order[b] = b, a
    return permuted(ctx.axes(x), order)


@rule(Family.MOVEMENT, "unsqueeze", "squeeze")
def resize_ones(ctx: OpContext) -> ValueIds:
    """Only dims of size 1 come or go: a reshape."""
    x = ctx["self"]
    return reshape(ctx.constraints, ctx.axes(x), ctx.shape(x), ctx.out)


@rule(Family.MOVEMENT, "expand", "broadcast_to", "expand_copy")
def expand(ctx: OpContext) -> ValueIds:
    """A dim of size 1 that is repeated follows whatever it meets: its copies are alike. As often as a batch
    is long: it stays.
    """
    x = ctx["self"]
    ndim = len(ctx.out)
    axes = shift(ctx.axes(x), len(ctx.shape(x)), ndim)
    old = (1,) * (ndim - len(ctx.shape(x))) + ctx.shape(x)
    return {**axes, **_copies(ctx, old)}


@rule(Family.MOVEMENT, "as_strided")
def as_strided(ctx: OpContext) -> ValueIds:
    """Windows on memory that may overlap: dims that one of the output's steps through from end to end, and no
    other one, pass.
    """
    if "layout" not in ctx.node.meta:  # in place: what it was written to lies there no longer as it did
        return dict(opaque(ctx))
    x, sizes, strides = ctx["self"], ctx["size"], ctx["stride"]
    shape = ctx.shape(x)
    place = dict[int, int]()
    layout, offset = ctx.node.meta["layout"]
    steps = dense(shape, layout)
    for dim, (size, step) in enumerate(zip(shape, steps, strict=True)):
        own = [i for i, (n, t) in enumerate(zip(sizes, strides, strict=True)) if (n, t) == (size, step)]
        rest = [(n, t) for i, (n, t) in enumerate(zip(sizes, strides, strict=True)) if n > 1 and i not in own]
        inside = sum((n - 1) * t for n, t in rest if t < step)
        if len(own) == 1 and inside < step and all(t < step or t % (size * step) == 0 for _, t in rest):
            place[dim] = own[0]
    gaps = any(n > 1 and step != found for n, step, found in zip(shape, steps, layout, strict=True))
    if gaps or ctx["storage_offset"] not in (None, offset):
        place = {}
    axes = ctx.freeze(ctx.axes(x), set(range(len(shape))) - set(place), "is read in windows of memory")
    result: ValueIds = {}
    for dim, track in axes.items():
        for other in set(range(len(shape))) - set(place):
            track = ctx.constraints.collapse(track, other)
        order = sorted(place, key=place.__getitem__)
        moved = track.transpose([*order, *(d for d in range(len(shape)) if d not in place)])
        wide = [1] * len(sizes)
        for d in order:
            wide[place[d]] = track.shape[d]
        result[place[dim]] = moved.reshape(wide)
    return result


def dense(shape: Sequence[int], layout: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dims lie in memory in the order of the strides `layout`."""
    steps, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (layout[d], -d)):
        steps[dim] = step
        step *= shape[dim]
    return tuple(steps)


@rule(Family.MOVEMENT, "cat", "concat")
def cat(ctx: OpContext) -> ValueIds:
    parts = list(ctx["tensors"])
    parts = [p for p in parts if ctx.shape(p) != (0,)]
    ndim = len(ctx.out)
    dim = int(ctx["dim"]) % ndim
    result: ValueIds = {}
    for d in range(ndim):
        tracks = [ctx.axes(p).get(d) for p in parts]
        if all(t is None for t in tracks):
            continue
        if d != dim:
            kept = [t for t in tracks if t is not None]
            if len(kept) < len(parts):
                for loose in kept:
                    ctx.constraints.freeze(loose, "is concatenated with a tensor whose size here is fixed")
            else:
                result[d] = _cat_rows(ctx, kept, parts, d, dim)
            continue
        filled = []
        for part, found in zip(parts, tracks, strict=True):
            size, track = ctx.shape(part)[dim], found
            if track is None:  # entries that nobody may remove
                track = ctx.constraints.new(size).reshape([-1 if i == dim else 1 for i in range(ndim)])
                ctx.constraints.freeze(track, "is concatenated and its size is fixed")
            filled.append(track)
        rows = np.broadcast_shapes(
            *[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in filled]
        )
        full = [
            np.broadcast_to(t, [t.shape[i] if i == dim else rows[i] for i in range(ndim)]) for t in filled
        ]
        result[dim] = np.concatenate(full, axis=dim)
    return result


def _cat_rows(ctx: OpContext, tracks: list[DimIds], parts: list[fx.Node], own: int, dim: int) -> DimIds:
    """Tracks of another dim than the concatenated one: joined, or laid side by side where they vary along
    it.
    """
    if all(t.shape[dim] == 1 for t in tracks):
        return beside(ctx.constraints, tracks)
    sizes = [ctx.shape(p)[dim] for p in parts]
    rows = np.broadcast_shapes(*[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in tracks])
    full = [
        np.broadcast_to(t, [size if i == dim else rows[i] for i in range(t.ndim)])
        for t, size in zip(tracks, sizes, strict=True)
    ]
    joined = np.concatenate(full, axis=dim)
    ctx.constraints.balance(joined, own)  # the rows of one part keep as many entries as those of the others
    return joined


@rule(Family.MOVEMENT, "stack")
def stack(ctx: OpContext) -> ValueIds:
    parts = list(ctx["tensors"])
    dim = int(ctx["dim"]) % len(ctx.out)
    result: ValueIds = {}
    for d in {d for p in parts for d in ctx.axes(p)}:
        tracks = [ctx.axes(p).get(d) for p in parts]
        kept = [np.expand_dims(t, dim) for t in tracks if t is not None]
        if len(kept) < len(parts):
            for track in kept:
                ctx.constraints.freeze(track, "is stacked with a tensor whose size here is fixed")
            continue
        rows = np.broadcast_shapes(*[t.shape for t in kept])
        joined = np.concatenate([np.broadcast_to(t, rows) for t in kept], axis=dim)
        out = d + (d >= dim)
        if dim < out:  # the stacked tensors are rows: each may keep its own entries, equally many
            ctx.constraints.balance(joined, out)
            result[out] = joined
        else:
            result[out] = ctx.constraints.collapse(joined, dim)
    return result


@rule(Family.MOVEMENT, "view_as_real", "view_as_complex")
def complex_parts(ctx: OpContext) -> ValueIds:
    """[..., 2] and [...] of complex numbers: the real and the imaginary part are two entries, both of which
    stay.
    """
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    if op_name(ctx.node) == "view_as_real":
        return {d: t[..., None] for d, t in ctx.axes(x).items()}
    axes = ctx.freeze(ctx.axes(x), [ndim - 1], "holds the real and the imaginary part")
    return {d: ctx.constraints.collapse(t, ndim - 1)[..., 0] for d, t in axes.items()}


@rule(Family.MOVEMENT, "flip")
def flip(ctx: OpContext) -> ValueIds:
    ndim = len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dims"]]
    return {d: np.flip(t, tuple(i for i in dims if t.shape[i] > 1)) for d, t in ctx.axes(ctx["self"]).items()}


@rule(Family.MOVEMENT, "roll")
def roll(ctx: OpContext) -> ValueIds:
    """Rolling along a dim without channels moves nothing that matters; along channels the shift is a number
    in the code.
    """
    ndim = len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dims"]] or list(range(ndim))
    axes = ctx.freeze(ctx.axes(ctx["self"]), dims, "is rolled by a fixed number")
    return {
        d: np.roll(
            t,
            [s for s, i in zip(ctx["shifts"], dims, strict=False) if t.shape[i] > 1],
            [i for i in dims if t.shape[i] > 1],
        )
        for d, t in axes.items()
    }


@rule(Family.MOVEMENT, "repeat", "tile")
def repeat(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    ndim = len(ctx.out)
    old = (1,) * (ndim - len(ctx.shape(x))) + ctx.shape(x)
    counts = [new // size if size else 1 for new, size in zip(ctx.out, old, strict=True)]
    axes = {}
    for d, t in shift(ctx.axes(x), len(ctx.shape(x)), ndim).items():
        axes[d] = np.tile(t, [n if t.shape[i] > 1 else 1 for i, n in enumerate(counts)])
    return {**axes, **_copies(ctx, old)}


def _copies(ctx: OpContext, old: tuple[int, ...]) -> ValueIds:
    """Tracks of the dims that were of size 1, but for those whose new size the code read from a dim that is
    fixed.
    """
    sources = ctx.node.meta.get("repeated", {})
    fixed = {dim for dim, source in sources.items() if source.dim not in ctx.axes(source.node)}
    grown = [d for d, size in enumerate(ctx.out) if old[d] == 1 and size > 1 and d not in fixed]
    return unowned_ids(ctx, ctx.out, grown)


@rule(Family.MOVEMENT, "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
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


@rule(Family.MOVEMENT, "im2col", mixes=lambda c: {"self": range(2, len(c.shape(c["self"])))})
def unfold_image(ctx: OpContext) -> ValueIds:
    """x [N, C, H, W] -> [N, C * kernel places, positions]: all places of a channel go with it."""
    x = ctx["self"]
    places = math.prod(ctx["kernel_size"])
    axes = _without_places(ctx, x)
    return {d: np.repeat(t, places, axis=1)[..., 0] if t.shape[1] > 1 else t[..., 0] for d, t in axes.items()}


@rule(Family.MOVEMENT, "col2im", mixes=lambda c: {"self": [2]})
def fold_image(ctx: OpContext) -> ValueIds:
    """x [N, C * kernel places, positions] -> [N, C, H, W], places that overlap summed: those of a channel are
    one.
    """
    x = ctx["self"]
    places = math.prod(ctx["kernel_size"])
    result: ValueIds = {}
    for d, track in _without_places(ctx, x).items():
        if track.shape[1] > 1:
            cut = track.reshape(track.shape[0], -1, places, 1)
            track = ctx.constraints.collapse(cut, 2)
        else:
            track = track[..., None]
        result[d] = track
    return result


def _without_places(ctx: OpContext, x: fx.Node) -> ValueIds:
    """Tracks of the batch and channel dims, constant over the spatial ones, which stay whole."""
    ndim = len(ctx.shape(x))
    return ctx.freeze(ctx.axes(x), range(2, ndim), "is a spatial dim of an unfold")
