"""Reductions and normalisations: a dim of one operand ends, or its entries are normalised by each other.

Ids pass along the dims that stay. `renormalises` says which ops compute something else when fewer entries are
there (a mean, a softmax, a layer norm): the proof computes those over the entries that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from surgeon.graph.queries import is_read
from surgeon.ops.elementwise import per_channel
from surgeon.ops.ids import ValueIds
from surgeon.ops.reshape import reshape
from surgeon.ops.table import Family, OpContext, along, broadcast, op_name, rule


def reduce_dims(ctx: OpContext, axes: ValueIds, dims: Any, ndim: int, keepdim: bool) -> ValueIds:
    """Tracks after the dims ended; a track that varied along one of them is made constant there."""
    gone = {int(d) % ndim for d in dims} if ndim else set()
    for d in gone & set(axes):
        ctx.constraints.reduced(axes[d])
    result: ValueIds = {}
    for dim, track in axes.items():
        if dim in gone:
            continue
        for ended in gone:
            track = ctx.constraints.collapse(track, ended)
        if not keepdim:
            track = track.reshape([n for d, n in enumerate(track.shape) if d not in gone])
        result[dim if keepdim else dim - sum(g < dim for g in gone)] = track
    return result


@rule(
    Family.REDUCTION, "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm",
    "logsumexp", "any", "all", "prod", "nansum", mixes=along,
)  # fmt: skip
def reduction(ctx: OpContext) -> Any:
    x, dims = ctx["self"], ctx.get("dim")
    ndim = len(ctx.shape(x))
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        dims = range(ndim)
    axes = reduce_dims(ctx, ctx.axes(x), dims, ndim, bool(ctx.get("keepdim")))
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


def _picked(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    """Nothing is mixed of two operands that are compared entry by entry."""
    return {} if isinstance(ctx.get("other"), fx.Node) else along(ctx)


@rule(
    Family.REDUCTION,
    "max",
    "min",
    "argmax",
    "argmin",
    "median",
    "nanmedian",
    "kthvalue",
    "mode",
    mixes=_picked,
)
def selection(ctx: OpContext) -> Any:
    """Pick one entry along a dim and tell its index: if that is read, the dim may not lose entries.

    The greatest of all is a number.
    """
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    second, other = ctx.get("dim"), ctx.get("other")
    spec = ctx.node.meta["spec"]
    if isinstance(other, fx.Node):  # max.other
        operands = [(ctx.axes(a), ctx.shape(a)) for a in (x, other)]
        return broadcast(ctx, operands, ctx.out)
    if second is None and op_name(ctx.node) in ("max", "min"):
        return {}
    if second is None:
        ctx.constraints.freeze_all(ctx.axes(x), "an index is computed over it")
        return tuple({} for _ in spec) if isinstance(spec, tuple) else {}
    axes = ctx.axes(x)
    if op_name(ctx.node) not in ("max", "min") or is_read(ctx.node, 1):
        axes = ctx.freeze(axes, [second % ndim], "an index is computed over it")
    axes = reduce_dims(ctx, axes, [second], ndim, bool(ctx["keepdim"]))
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", mixes=along)
def softmax(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    dim = int(ctx["dim"]) % max(1, len(ctx.out))
    axes = dict(ctx.axes(x))
    if dim in axes:
        ctx.constraints.reduced(axes[dim])
    return axes


@rule(Family.REDUCTION, "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk", mixes=along)
def ordered(ctx: OpContext) -> Any:
    """Entries along the dim depend on their order: that dim stays whole."""
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    name = op_name(ctx.node)
    axes = ctx.freeze(ctx.axes(x), [int(ctx["dim"]) % max(ndim, 1)], f"{name} runs along it")
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


@rule(Family.REDUCTION, "_fft_r2c", "_fft_c2c", "_fft_c2r", mixes=along)
def fourier(ctx: OpContext) -> ValueIds:
    """Each result hangs on every entry along the dims and on its place: they stay whole."""
    x, ndim = ctx["self"], len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dim"]]
    return ctx.freeze(ctx.axes(x), dims, "a Fourier transform runs along it")


def _last_dims(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"input": range(-len(ctx["normalized_shape"]), 0)}


@rule(Family.REDUCTION, "native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm", mixes=_last_dims)
def layer_norm(ctx: OpContext) -> Any:
    """x [..., normalized_shape] normalised over the last dims, scaled by weight and bias of that shape."""
    x, shape = ctx["input"], ctx["normalized_shape"]
    last = len(shape)
    operands = [(ctx.axes(x), ctx.shape(x))]
    operands += [
        (ctx.axes(v), ctx.shape(v)) for v in (ctx["weight"], ctx.get("bias")) if isinstance(v, fx.Node)
    ]
    out = broadcast(ctx, operands, ctx.out)
    ndim = len(ctx.out)
    gone = range(ndim - last, ndim)
    for d in set(gone) & set(ctx.axes(x)):  # x itself: the scale that it meets comes after
        ctx.constraints.reduced(ctx.axes(x)[d])
    passing = {d: t for d, t in out.items() if d < ndim - last}
    stats = reduce_dims(ctx, passing, gone, ndim, keepdim=True)
    spec = ctx.node.meta["spec"]
    return tuple(out if i == 0 else stats for i, _ in enumerate(spec)) if isinstance(spec, tuple) else out


@rule(Family.REDUCTION, "native_group_norm", "group_norm", mixes=lambda c: {"input": range(1, len(c.out))})
def group_norm(ctx: OpContext) -> Any:
    """x [N, C, ...] normalised over each of g groups of C/g channels: groups are rows, every row keeps
    equally many.
    """
    x, weight, bias = ctx["input"], ctx["weight"], ctx["bias"]
    groups = int(ctx["group|num_groups"])
    shape = ctx.shape(x)
    axes = ctx.freeze(ctx.axes(x), range(2, len(shape)), "is a spatial dim of a group norm")
    grid = (shape[0], groups, shape[1] // groups, *shape[2:])
    cut = reshape(ctx.constraints, axes, shape, grid)
    for d in {1, 2} & set(cut):
        ctx.constraints.reduced(cut[d])
    axes = reshape(ctx.constraints, cut, grid, shape)
    if 1 in cut:
        ctx.constraints.batched.append(cut[1].ravel())
    operands = [(axes, shape)]
    for vector in (weight, bias):
        if isinstance(vector, fx.Node):
            wide, track = per_channel(ctx.shape(vector), ctx.axes(vector), len(shape))
            operands.append((track, wide))
    out = broadcast(ctx, operands, shape)
    return tuple(out if i == 0 else {} for i, _ in enumerate(ctx.node.meta["spec"]))


def _all_but(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"v": set(range(len(ctx.out))) - {ctx["dim"] % len(ctx.out)}}


@rule(Family.REDUCTION, "_weight_norm_interface", mixes=_all_but)
def weight_norm(ctx: OpContext) -> Any:
    """v * g / |v|, the norm over all dims but one: g is [O, 1, ...] along that dim."""
    v, g = ctx["v"], ctx["g"]
    out = broadcast(ctx, [(ctx.axes(v), ctx.shape(v)), (ctx.axes(g), ctx.shape(g))], ctx.out)
    return out, {d: t for d, t in out.items() if d == int(ctx["dim"])}


_POOLS = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "max_pool1d": 1, "max_pool2d": 2, "avg_pool1d": 1,
    "avg_pool2d": 2, "avg_pool3d": 3, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_avg_pool1d": 1,
    "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "upsample_nearest1d": 1,
    "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_linear1d": 1,
    "upsample_trilinear3d": 3, "_upsample_nearest_exact2d": 2, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "reflection_pad1d": 1, "reflection_pad2d": 2, "replication_pad1d": 1, "replication_pad2d": 2, "replication_pad3d": 3,
    "mkldnn_max_pool2d": 2,
}  # fmt: skip


@rule(Family.REDUCTION, *_POOLS, mixes=lambda c: {"self|input": range(-_POOLS[op_name(c.node)], 0)})
def pooling(ctx: OpContext) -> Any:
    """Windows over the last spatial dims; batch and channels pass."""
    name = op_name(ctx.node)
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    spatial = range(ndim - _POOLS[name], ndim)
    axes = ctx.freeze(ctx.axes(x), spatial, f"is a spatial dim of {name}")
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


def _places(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"input": range(2, len(ctx.out)), "grid": [-1]}


@rule(Family.REDUCTION, "grid_sampler_2d", "grid_sampler_3d", mixes=_places)
def grid_sampler(ctx: OpContext) -> Any:
    """x is [N, C, spatial], the grid [N, spatial, 2 or 3]: each sample reads its own places; channels
    pass.
    """
    x, grid = ctx["input"], ctx["grid"]
    places = "is a place or a coordinate of grid_sample"
    axes = ctx.freeze(ctx.axes(x), range(2, len(ctx.shape(x))), "is a spatial dim of grid_sample")
    own = ctx.freeze(ctx.axes(grid), range(1, len(ctx.shape(grid))), places)
    one = (1,) * (len(ctx.out) - 1)
    samples = broadcast(
        ctx,
        [({d: t for d, t in a.items() if d == 0}, (ctx.out[0], *one)) for a in (axes, own)],
        (ctx.out[0], *one),
    )
    return {d: t for d, t in axes.items() if d != 0} | samples
