"""Normalisations: entries are divided by what they are together. The proof computes them over the entries that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.queries import is_read
from surgeon.ops import masks
from surgeon.ops.context import OpContext, along, broadcast
from surgeon.ops.families.elementwise import per_channel
from surgeon.ops.families.moves.reshape import reshape
from surgeon.ops.families.reduction import reduce_dims
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.masks import Mask
from surgeon.ops.table import Family, Trait, op


def softmax(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    dim = int(ctx["dim"]) % max(1, len(ctx.out))
    axes = dict(ctx.axes(x))
    if dim in axes:
        ctx.constraints.reduced(axes[dim])
    return axes


def _last_dims(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"input": range(-len(ctx["normalized_shape"]), 0)}


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
            wide, dim_ids = per_channel(ctx.shape(vector), ctx.axes(vector), len(shape))
            operands.append((dim_ids, wide))
    out = broadcast(ctx, operands, shape)
    return tuple(out if i == 0 else {} for i, _ in enumerate(ctx.node.meta["spec"]))


def batch_norm(ctx: OpContext) -> Any:
    """x [N, C, ...] with vectors [C]; each channel by itself, in training mode too."""
    x = ctx["input"]
    vectors = [ctx.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    ndim, axes = len(ctx.out), ctx.axes(x)
    if any(is_read(ctx.node, place) for place in range(1, len(ctx.node.meta["spec"]))):
        axes = ctx.freeze(axes, set(range(ndim)) - {1}, "statistics that are read are taken over it")
    operands = [(axes, ctx.shape(x))]
    for vector in (v for v in vectors if v is not None):
        shape, axes = per_channel(ctx.shape(vector), ctx.axes(vector), ndim)
        operands.append((axes, shape))
    out = broadcast(ctx, operands, ctx.out)
    vector_ids = (
        {0: out[1].reshape(-1)} if 1 in out else {}
    )  # of statistics, as they are or as they are written
    return tuple(
        out if i == 0 else vector_ids if spec is not None and spec.shape == ctx.out[1:2] else {}
        for i, spec in enumerate(ctx.node.meta["spec"])
    )


def _all_but(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    return {"v": set(range(len(ctx.out))) - {ctx["dim"] % len(ctx.out)}}


def weight_norm(ctx: OpContext) -> Any:
    """v * g / |v|, the norm over all dims but one: g is [O, 1, ...] along that dim."""
    v, g = ctx["v"], ctx["g"]
    out = broadcast(ctx, [(ctx.axes(v), ctx.shape(v)), (ctx.axes(g), ctx.shape(g))], ctx.out)
    return out, {d: t for d, t in out.items() if d == int(ctx["dim"])}


# -- what is computed when entries are gone -----------------------------------------------------------------


def softmax_absent(call: MaskedOp) -> Any:
    x, dim = call["self"], call["dim"] % call.data(call["self"]).dim()
    data, mask = call.values[x]
    if masks.varies(mask, [dim]):
        data = data.masked_fill(~masks.full(mask, data.shape), -math.inf)
        log = "log" in call.name
        return (torch.log_softmax(data, dim) if log else torch.softmax(data, dim)), mask
    return call.run(call.data), mask


def layer_norm_absent(call: MaskedOp) -> Any:
    x, shape = call["input"], call["normalized_shape"]
    data, mask = call.values[x]
    rms = "rms" in call.name
    weight, bias, eps = call["weight"], call.get("bias"), call["eps"]
    dims = list(range(data.dim() - len(shape), data.dim()))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    result = normalised(data, mask, dims, eps, center=not rms)
    factors = list(mask)
    if weight is not None:
        result = result * call.data(weight)
        factors += masks.aligned(call.mask(weight), data.dim())
    if bias is not None:
        result = result + call.data(bias)
        factors += masks.aligned(call.mask(bias), data.dim())
    tuple_out = isinstance(call.node.meta["spec"], tuple)
    return (
        [(result, masks.tidy(factors)), (None, ()), (None, ())]
        if tuple_out
        else (result, masks.tidy(factors))
    )


def normalised(data: Tensor, mask: Mask, dims: list[int], eps: float, center: bool = True) -> Tensor:
    count = masks.counted(mask, data.shape, dims) if mask else math.prod(data.shape[d] for d in dims)
    zero = masks.zeroed(data, mask)
    mean = zero.sum(dims, keepdim=True) / count if center else torch.zeros((), dtype=data.dtype)
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / count
    return (zero - mean) / torch.sqrt(spread + eps)


def group_norm_absent(call: MaskedOp) -> Any:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    groups, eps = call["group|num_groups"], call["eps"]
    data, mask = call.values[x]
    cut = (data.shape[0], groups, data.shape[1] // groups, *data.shape[2:])
    grid = masks.moved(mask, data.shape, lambda f: f.contiguous().reshape(cut), exact=True)
    result = normalised(data.reshape(cut), grid, list(range(2, len(cut))), eps).reshape(data.shape)
    factors = list(mask)
    for vector, scale in ((weight, True), (bias, False)):
        if vector is not None:
            wide = (1, -1, *(1,) * (data.dim() - 2))
            value = call.data(vector).reshape(wide)
            result = result * value if scale else result + value
            factors += [f.reshape(wide) for f in call.mask(vector)]
    return [(result, masks.tidy(factors)), (None, ()), (None, ())]


def batch_norm_absent(call: MaskedOp) -> Any:
    """In training mode each channel is normalised by what is present of it (standardised weights are written
    so).
    """
    data, mask = call.values[call["input"]]
    ndim = data.dim()
    others = [d for d in range(ndim) if d != 1]
    result = list(call.run(call.data))
    if call.get("training") is True and masks.varies(mask, others):
        plain = normalised(data, mask, others, call["eps|epsilon"])
        for vector, scale in ((call["weight"], True), (call["bias"], False)):
            if vector is not None:
                wide = call.data(vector).reshape(1, -1, *(1,) * (ndim - 2))
                plain = plain * wide if scale else plain + wide
        result = [plain, *(None for _ in result[1:])]  # nothing reads the others
    factors = list(mask)
    for vector in map(call.get, ("weight", "bias", "running_mean", "running_var")):
        factors += [f.reshape(1, -1, *(1,) * (ndim - 2)) for f in call.mask(vector)]
    whole = masks.tidy(factors)
    statistics = tuple(f.reshape(-1) for f in masks.any_along(whole, others))
    return [
        (
            item,
            whole if place == 0 else statistics if item is not None and item.shape == data.shape[1:2] else (),
        )
        for place, item in enumerate(result)
    ]


def weight_norm_absent(call: MaskedOp) -> Any:
    v, g = call["v"], call["g"]
    data, mask = call.data(v), call.mask(v)
    dims = [d for d in range(data.dim()) if d != call["dim"]]
    norm = (masks.zeroed(data, mask) ** 2).sum(dims, keepdim=True).sqrt()
    both = masks.tidy([*mask, *masks.aligned(call.mask(g), data.dim())])
    return [(data * call.data(g) / norm, both), (norm, masks.any_along(both, dims))]


op(
    "_softmax _log_softmax softmax log_softmax _safe_softmax",
    Family.REDUCTION,
    ids=softmax,
    absent=softmax_absent,
    mixes=along,
)
op(
    "native_layer_norm layer_norm _fused_rms_norm rms_norm",
    Family.REDUCTION,
    ids=layer_norm,
    absent=layer_norm_absent,
    mixes=_last_dims,
)
op(
    "native_group_norm group_norm",
    Family.REDUCTION,
    ids=group_norm,
    absent=group_norm_absent,
    mixes=lambda c: {"input": range(1, len(c.out))},
)
op("_weight_norm_interface", Family.REDUCTION, ids=weight_norm, absent=weight_norm_absent, mixes=_all_but)
op(
    """
    native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    _batch_norm_no_update _native_batch_norm_legit_functional
    """,
    Family.ELEMENTWISE,
    ids=batch_norm,
    absent=batch_norm_absent,
    mixes=lambda c: {"input": set(range(len(c.out))) - {1}},
    traits={Trait.BATCH_NORM},
)
