"""Windows over spatial dims: pooling, resampling, patches. Batch and channels pass, the spatial dims stay whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import fx

from surgeon.ops import masks
from surgeon.ops.context import OpContext, broadcast
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp, refusal
from surgeon.ops.table import Family, Trait, op, op_name


def pooling(ctx: OpContext, dims: int) -> Any:
    """Windows over the last `dims` dims."""
    name = op_name(ctx.node)
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    spatial = range(ndim - dims, ndim)
    axes = ctx.freeze(ctx.axes(x), spatial, f"is a spatial dim of {name}")
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


def _places(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"input": range(2, len(ctx.out)), "grid": [-1]}


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


def unfold_image(ctx: OpContext) -> ValueIds:
    """x [N, C, H, W] -> [N, C * kernel places, positions]: all places of a channel go with it."""
    x = ctx["self"]
    places = math.prod(ctx["kernel_size"])
    axes = _without_places(ctx, x)
    return {d: np.repeat(t, places, axis=1)[..., 0] if t.shape[1] > 1 else t[..., 0] for d, t in axes.items()}


def fold_image(ctx: OpContext) -> ValueIds:
    """x [N, C * kernel places, positions] -> [N, C, H, W], places that overlap summed: those of a channel are
    one.
    """
    x = ctx["self"]
    places = math.prod(ctx["kernel_size"])
    result: ValueIds = {}
    for d, dim_ids in _without_places(ctx, x).items():
        if dim_ids.shape[1] > 1:
            cut = dim_ids.reshape(dim_ids.shape[0], -1, places, 1)
            dim_ids = ctx.constraints.collapse(cut, 2)
        else:
            dim_ids = dim_ids[..., None]
        result[d] = dim_ids
    return result


def _without_places(ctx: OpContext, x: fx.Node) -> ValueIds:
    """Ids of the batch and channel dims, constant over the spatial ones, which stay whole."""
    ndim = len(ctx.shape(x))
    return ctx.freeze(ctx.axes(x), range(2, ndim), "is a spatial dim of an unfold")


def unfold_dim(ctx: OpContext) -> ValueIds:
    """Sliding windows along one dim: that dim stays whole."""
    x = ctx["self"]
    dim = int(ctx["dimension"]) % max(1, len(ctx.shape(x)))
    axes = ctx.freeze(ctx.axes(x), [dim], "is unfolded into windows")
    return {d: t[..., None] for d, t in axes.items()}


# -- what is computed when entries are gone -----------------------------------------------------------------


def pooling_absent(call: MaskedOp, dims: int) -> Any:
    x = call["self"]
    data, mask = call.values[x]
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    moved_dims = [
        d
        for d in range(data.dim())
        if d >= data.dim() - (3 if "3d" in call.name else 1 if "1d" in call.name else 2)
    ]
    if masks.varies(mask, moved_dims) or first.dim() != data.dim():
        raise refusal(call, "it runs over dims that lost entries")
    return call.outputs(result, mask)


def unfolded_absent(call: MaskedOp) -> Any:
    """im2col and col2im: a channel and all its kernel places are present or not."""
    result, mask = call.run(call.zeroed), call.mask(call["self"])
    if masks.varies(mask, range(2, call.data(call["self"]).dim())):
        raise refusal(call, "presence varies over spatial dims")
    times = math.prod(call["kernel_size"])
    found = []
    for factor in mask:
        if factor.shape[1] == 1:
            own = factor.flatten(2)[..., :1]
        elif "im2col" in call.name:
            own = factor.flatten(2)[..., :1].repeat_interleave(times, dim=1)
        else:
            own = factor.reshape(factor.shape[0], -1, times).any(dim=2, keepdim=True)
        found.append(own.reshape(*own.shape[:2], *(1,) * (result.dim() - 2)))
    return result, masks.tidy(found)


def sampled_absent(call: MaskedOp) -> Any:
    """grid_sample: samples and channels are present or not."""
    x, grid = call["input"], call["grid"]
    if masks.varies(call.mask(x), range(2, call.data(x).dim())) or masks.varies(
        call.mask(grid), range(1, call.data(grid).dim())
    ):
        raise refusal(call, "presence varies over places")
    return call.run(call.zeroed), masks.tidy([*call.mask(x), *call.mask(grid)])


def windows(names: str, dims: int) -> None:
    """Declare ops that slide windows over the last `dims` dims."""
    ids, absent = functools.partial(pooling, dims=dims), functools.partial(pooling_absent, dims=dims)
    op(
        names, Family.REDUCTION, ids=ids, absent=absent, mixes=lambda c: {"self|input": range(-dims, 0)},
        traits={Trait.AVERAGES},
    )  # fmt: skip


windows(
    """
    max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d
    replication_pad1d
    """,
    1,
)
windows(
    """
    max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d
    adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d
    replication_pad2d mkldnn_max_pool2d
    """,
    2,
)
windows(
    """
    max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d
    upsample_trilinear3d replication_pad3d
    """,
    3,
)
op(
    "grid_sampler_2d grid_sampler_3d",
    Family.REDUCTION,
    ids=grid_sampler,
    absent=sampled_absent,
    mixes=_places,
)
op(
    "im2col", Family.MOVEMENT,
    ids=unfold_image, absent=unfolded_absent, mixes=lambda c: {"self": range(2, len(c.shape(c["self"])))},
)  # fmt: skip
op("col2im", Family.MOVEMENT, ids=fold_image, absent=unfolded_absent, mixes=lambda c: {"self": [2]})
op("unfold", Family.MOVEMENT, ids=unfold_dim, mixes=lambda c: {"self": [c["dimension"]]})
