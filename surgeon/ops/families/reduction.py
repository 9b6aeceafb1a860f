"""Reductions and scans: a dim of one operand ends, or its entries are put together in their order. Ids pass along the dims
that stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.queries import is_read
from surgeon.ops import masks
from surgeon.ops.context import OpContext, along, broadcast
from surgeon.ops.families.contraction import contraction, product_absent
from surgeon.ops.families.elementwise import elementwise_absent
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp, refusal, unchanged
from surgeon.ops.masks import Mask
from surgeon.ops.table import Family, Trait, defaults, op, op_name


def reduce_dims(ctx: OpContext, axes: ValueIds, dims: Any, ndim: int, keepdim: bool) -> ValueIds:
    """Ids after the dims ended; those that varied along one of them are made constant there."""
    gone = {int(d) % ndim for d in dims} if ndim else set()
    for d in gone & set(axes):
        ctx.constraints.reduced(axes[d])
    result: ValueIds = {}
    for dim, dim_ids in axes.items():
        if dim in gone:
            continue
        for ended in gone:
            dim_ids = ctx.constraints.collapse(dim_ids, ended)
        if not keepdim:
            dim_ids = dim_ids.reshape([n for d, n in enumerate(dim_ids.shape) if d not in gone])
        result[dim if keepdim else dim - sum(g < dim for g in gone)] = dim_ids
    return result


def reduction(ctx: OpContext) -> Any:
    x, dims = ctx["self"], ctx.get("dim")
    ndim = len(ctx.shape(x))
    dims = [dims] if isinstance(dims, int) else dims
    if not dims:
        dims = range(ndim)
    axes = reduce_dims(ctx, ctx.axes(x), dims, ndim, bool(ctx.get("keepdim")))
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


def _compared_along(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    """Nothing is mixed of two operands that are compared entry by entry."""
    return {} if isinstance(ctx.get("other"), fx.Node) else along(ctx)


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


def ordered(ctx: OpContext) -> Any:
    """Entries along the dim depend on their order: that dim stays whole."""
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    name = op_name(ctx.node)
    axes = ctx.freeze(ctx.axes(x), [int(ctx["dim"]) % max(ndim, 1)], f"{name} runs along it")
    spec = ctx.node.meta["spec"]
    return tuple(axes for _ in spec) if isinstance(spec, tuple) else axes


def fourier(ctx: OpContext) -> ValueIds:
    """Each result hangs on every entry along the dims and on its place: they stay whole."""
    x, ndim = ctx["self"], len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dim"]]
    return ctx.freeze(ctx.axes(x), dims, "a Fourier transform runs along it")


def pairs(ctx: OpContext) -> ValueIds:
    """Distances of all rows from each other: each row has its places in the result."""
    axes = ctx.freeze(ctx.axes(ctx["self"]), [0], "its rows are compared with each other")
    if 1 in axes:
        ctx.constraints.reduced(ctx.constraints.collapse(axes[1], 0))
    return {}


# -- what is computed when entries are gone -----------------------------------------------------------------


def reduced_dims(call: MaskedOp) -> list[int]:
    ndim, dims = call.data(call["self|input"]).dim(), call.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return [d % ndim for d in dims] if dims else list(range(ndim))


# what stands for an absent entry without changing the result
_NEUTRAL = {"amax": -math.inf, "amin": math.inf, "logsumexp": -math.inf, "prod": 1, "any": False, "all": True}


def reduced(call: MaskedOp) -> Any:
    """Sums read absent entries as zero, means and variances count the present ones, extrema skip the absent
    ones.
    """
    x = call["self"]
    data, mask = call.values[x]
    dims = reduced_dims(call)
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    keep = first.dim() == data.dim()
    if masks.varies(mask, dims):
        count = masks.counted(mask, data.shape, dims)
        zero = masks.zeroed(data, mask)
        name = call.name
        if name in ("sum", "nansum"):
            result = zero.sum(dims, keepdim=keep)
        elif name == "mean":
            result = zero.sum(dims, keepdim=True) / count
            result = result if keep else result.squeeze(dims)
        elif name in _NEUTRAL:
            filled = data.masked_fill(~masks.full(mask, data.shape), _NEUTRAL[name])
            result = call.on(x, filled)
        elif name in ("norm", "linalg_vector_norm"):
            result = call.on(x, data.masked_fill(~masks.full(mask, data.shape), _absent_from_norm(call)))
        elif name in ("var", "var_mean", "std", "std_mean"):
            result = _variance(call, zero, mask, count, dims, keep)
        else:
            raise refusal(call, "it runs over dims that lost entries")
    passed = masks.any_along(mask, dims, keepdim=keep)
    if isinstance(result, list | tuple):
        return [(r, passed) for r in result]
    return result, passed


def _absent_from_norm(call: MaskedOp) -> float:
    """Zero adds nothing to a norm of a positive order; to one of a negative order only infinity does."""
    order = call.get("p" if call.name == "norm" else "ord")
    return math.inf if order is not None and order < 0 else 0.0


def extremum(call: MaskedOp) -> Any:
    """max and min along a dim: over what is present, if their indices are not read."""
    x = call["self"]
    data, mask = call.values[x]
    dims = reduced_dims(call)
    least = -math.inf if call.name == "max" else math.inf
    values, indices = call.on(x, data.masked_fill(~masks.full(mask, data.shape), least))
    passed = masks.any_along(mask, dims, keepdim=values.dim() == data.dim())
    return [(values, passed), (indices, passed)]


def _variance(call: MaskedOp, zero: Tensor, mask: Mask, count: Tensor, dims: list[int], keep: bool) -> Any:
    correction = call.get("correction")
    correction = (
        int(call["unbiased"]) if "unbiased" in call.arguments else 1 if correction is None else correction
    )
    count = count.to(zero.real.dtype)  # whole numbers less a fraction would be rounded to float32
    mean = zero.sum(dims, keepdim=True) / count
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / (count - correction).clamp_min(
        0
    )
    value = spread.sqrt() if call.name.startswith("std") else spread
    value, mean = (value, mean) if keep else (value.squeeze(dims), mean.squeeze(dims))
    return (value, mean) if call.name.endswith("_mean") else value


def picked(call: MaskedOp) -> Any:
    """max, min and kin: over what is present, if their indices are not read."""
    x, least = call["self"], -math.inf if call.name == "max" else math.inf
    if "other" in call.arguments:
        return elementwise_absent(call)
    if call.name in ("max", "min") and call.masked:
        data, mask = call.values[x]
        if "dim" not in call.arguments:
            return call.on(x, data.masked_fill(~masks.full(mask, data.shape), least)), ()
        if not is_read(call.node, 1):
            return extremum(call)
    return passed(call)


def passed(call: MaskedOp) -> Any:
    """Ops that pick, order or do anything else along dims: these must be whole."""
    x = next(iter(call.arguments.values()))
    if not (isinstance(x, fx.Node) and call.masked and len(call.node.all_input_nodes) == 1):
        return unchanged(call)
    data, mask = call.values[x]
    dims = reduced_dims(call)
    if masks.varies(mask, dims):
        return unchanged(call)
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    left = masks.any_along(mask, dims, keepdim=first.dim() == data.dim())
    return [(r, left) for r in result] if isinstance(result, list | tuple) else (result, left)


def pairs_absent(call: MaskedOp) -> Any:
    """What is absent of all rows adds nothing to their distances."""
    if masks.varies(call.mask(call["self"]), [0]):
        raise refusal(call, "rows that are compared with others were removed")
    return call.run(call.zeroed), ()


def euclidean_in_float64(x1: Tensor, x2: Tensor) -> Tensor:
    """Distances by differences: by products, those of rows that are close lose half of their digits."""
    return torch.cdist(x1, x2, compute_mode="donot_use_mm_for_euclid_dist")


defaults(Family.REDUCTION, absent=passed)

op("mean", Family.REDUCTION, ids=reduction, absent=reduced, mixes=along, traits={Trait.SUMS, Trait.AVERAGES})
op(
    "sum norm linalg_vector_norm",
    Family.REDUCTION,
    ids=reduction,
    absent=reduced,
    mixes=along,
    traits={Trait.SUMS},
)
op(
    "amax amin any all",
    Family.REDUCTION,
    ids=reduction,
    absent=reduced,
    mixes=along,
    traits={Trait.AVERAGES},
)
op(
    "nansum var std var_mean std_mean logsumexp prod",
    Family.REDUCTION,
    ids=reduction,
    absent=reduced,
    mixes=along,
)
op(
    "max min median nanmedian kthvalue mode", Family.REDUCTION,
    ids=selection, absent=picked, mixes=_compared_along, traits={Trait.AVERAGES},
)  # fmt: skip
op("argmax argmin", Family.REDUCTION, ids=selection, absent=picked, mixes=_compared_along)
op("cumsum cumprod cummax cummin logcumsumexp sort topk", Family.REDUCTION, ids=ordered, mixes=along)
op("_fft_r2c _fft_c2c _fft_c2r", Family.REDUCTION, ids=fourier, mixes=along)
op(
    "_euclidean_dist", Family.REDUCTION, "x1:Bik, x2:Bjk -> Bij", in_float64=euclidean_in_float64,
    ids=contraction, absent=product_absent, mixes=lambda c: {"x1": [-1], "x2": [-1]}, traits={Trait.SUMS},
)  # fmt: skip
op(
    "_cdist_forward", Family.REDUCTION, "x1:Bik, x2:Bjk -> Bij",  # of all rows i from all rows j
    ids=contraction, absent=product_absent, mixes=lambda c: {"x1": [-1], "x2": [-1]}, traits={Trait.SUMS},
)  # fmt: skip
op("_pdist_forward", Family.REDUCTION, ids=pairs, absent=pairs_absent, mixes=lambda c: {"self": [0, 1]})
