"""What reductions and normalisations compute over the entries that are present: one function per kind of op.

Sums read absent entries as zero, means and variances count the present ones, extrema and softmax skip the
absent ones, norms normalise what is there. Windows (pooling, resampling) run over dims that must be whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from surgeon.ops import masks
from surgeon.ops.masked_op import Op, refusal
from surgeon.ops.masks import Mask


def reduced_dims(call: Op) -> list[int]:
    ndim, dims = call.data(call["self|input"]).dim(), call.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return [d % ndim for d in dims] if dims else list(range(ndim))


_NEUTRAL = {"amax": -math.inf, "amin": math.inf, "logsumexp": -math.inf, "prod": 1, "any": False, "all": True}


def reduction(call: Op) -> Any:
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
            result = call.on(x, zero)
        elif name in ("var", "var_mean", "std", "std_mean"):
            result = _variance(call, zero, mask, count, dims, keep)
        else:
            raise refusal(call, "it runs over dims that lost entries")
    passed = masks.any_along(mask, dims, keepdim=keep)
    if isinstance(result, list | tuple):
        return [(r, passed) for r in result]
    return result, passed


def extremum(call: Op) -> Any:
    """max and min along a dim: over what is present, if their indices are not read."""
    x = call["self"]
    data, mask = call.values[x]
    dims = reduced_dims(call)
    least = -math.inf if call.name == "max" else math.inf
    values, indices = call.on(x, data.masked_fill(~masks.full(mask, data.shape), least))
    passed = masks.any_along(mask, dims, keepdim=values.dim() == data.dim())
    return [(values, passed), (indices, passed)]


def _variance(call: Op, zero: Tensor, mask: Mask, count: Tensor, dims: list[int], keep: bool) -> Any:
    correction = call.get("correction")
    correction = (
        int(call["unbiased"]) if "unbiased" in call.arguments else 1 if correction is None else correction
    )
    mean = zero.sum(dims, keepdim=True) / count
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / (count - correction).clamp_min(
        0
    )
    value = spread.sqrt() if call.name.startswith("std") else spread
    value, mean = (value, mean) if keep else (value.squeeze(dims), mean.squeeze(dims))
    return (value, mean) if call.name.endswith("_mean") else value


def softmax(call: Op) -> Any:
    x, dim = call["self"], call["dim"] % call.data(call["self"]).dim()
    data, mask = call.values[x]
    if masks.varies(mask, [dim]):
        data = data.masked_fill(~masks.full(mask, data.shape), -math.inf)
        log = "log" in call.name
        return (torch.log_softmax(data, dim) if log else torch.softmax(data, dim)), mask
    return call.run(call.data), mask


def weight_norm(call: Op) -> Any:
    v, g = call["v"], call["g"]
    data, mask = call.data(v), call.mask(v)
    dims = [d for d in range(data.dim()) if d != call["dim"]]
    norm = (masks.zeroed(data, mask) ** 2).sum(dims, keepdim=True).sqrt()
    both = masks.tidy([*mask, *masks.aligned(call.mask(g), data.dim())])
    return [(data * call.data(g) / norm, both), (norm, masks.any_along(both, dims))]


def layer_norm(call: Op) -> Any:
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


def group_norm(call: Op) -> Any:
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


def window(call: Op) -> Any:
    """Pooling and resampling: batch and channels pass."""
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
