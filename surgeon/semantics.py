"""What each op computes when some entries of its operands are absent: the meaning that a cut must keep.

One function per kind of op: `Op` at work in, (data, mask) out. Sums read absent entries as zero, normalisations run over those
that are present, element-wise ops pass absence on, and an op that could do none of these refuses. This knows nothing of ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon import masks
from surgeon.errors import ProofError
from surgeon.graph import where
from surgeon.masks import Mask
from surgeon.rules.registry import Family, family

_HALVES = (torch.float32, torch.float16, torch.bfloat16)


def widened(item: Any) -> Any:
    """float64 for every narrower float dtype in an op's arguments."""
    if isinstance(item, torch.dtype):
        return torch.float64 if item in _HALVES else item
    return tuple(map(widened, item)) if isinstance(item, tuple) else item


class Op:
    """One op at work: its arguments as data, as masks, or as zeroed data."""

    def __init__(self, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any], values: Mapping[fx.Node, Any]) -> None:
        self.node, self.name, self.args, self.kwargs, self.values = node, name, args, kwargs, values

    def data(self, item: Any) -> Any:
        return self.values[item][0] if isinstance(item, fx.Node) else item

    def mask(self, item: Any) -> Mask:
        return self.values[item][1] if isinstance(item, fx.Node) else ()

    def zeroed(self, item: Any) -> Any:
        return masks.zeroed(*self.values[item]) if isinstance(item, fx.Node) else item

    def run(self, read: Callable[[Any], Any]) -> Any:
        """The op on its arguments as `read` gives them."""
        args = [_nest(a, read) for a in self.args]
        kwargs = {k: widened(_nest(v, read)) for k, v in self.kwargs.items()}
        return self.op(*map(widened, args), **kwargs)

    @property
    def op(self) -> Any:
        """The op itself; views as reshapes, because the reference's layouts in memory may differ."""
        return torch.reshape if self.name in ("view", "_unsafe_view", "_reshape_alias") else self.node.target

    @property
    def masked(self) -> bool:
        return any(self.values[n][1] for n in self.node.all_input_nodes if isinstance(self.values[n][1], tuple))

    def outputs(self, result: Any, mask: Mask) -> Any:
        """The result with its mask; further outputs (indices, statistics) share it where their shape allows."""
        if isinstance(result, list | tuple):
            return [
                (r, mask if i == 0 or (isinstance(r, Tensor) and r.shape == result[0].shape) else ())
                for i, r in enumerate(result)
            ]
        return result, mask


def _nest(item: Any, read: Callable[[Any], Any]) -> Any:
    if isinstance(item, list | tuple):
        return type(item)(_nest(x, read) for x in item)
    return read(item)


def _elementwise(call: Op) -> Any:
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    factors = [f for n in call.node.all_input_nodes for f in masks.aligned(call.mask(n), first.dim())]
    return call.outputs(result, masks.tidy(factors))


def _gated(call: Op) -> Any:
    data, mask = call.data(call.args[0]), call.mask(call.args[0])
    dim = (call.args[1] if len(call.args) > 1 else -1) % data.dim()
    first = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[0], exact=True)
    second = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[1], exact=True)
    return call.run(call.data), masks.tidy([*first, *second])


def _batch_norm(call: Op) -> Any:
    result = call.run(call.data)
    ndim = result[0].dim()
    factors = list(call.mask(call.args[0]))
    for vector in call.args[1:5]:
        factors += [f.reshape(1, -1, *(1,) * (ndim - 2)) for f in call.mask(vector)]
    return call.outputs(result, masks.tidy(factors))


def _prelu(call: Op) -> Any:
    x, weight = call.args[:2]
    result = call.run(call.data)
    wide = [f if f.dim() == result.dim() else f.reshape(1, -1, *(1,) * (result.dim() - 2)) for f in call.mask(weight)]
    return result, masks.tidy([*call.mask(x), *wide])


_TWO = {"slice_scatter", "select_scatter", "diagonal_scatter"}


def _movement(call: Op) -> Any:
    result = call.run(call.data)
    if not call.masked:
        return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())
    exact = call.name not in ("permute", "t", "transpose", "unsqueeze", "expand", "slice", "select")
    first = call.args[0]
    if isinstance(first, list | tuple):  # cat, stack: presence as one tensor per operand
        parts = [masks.full(call.mask(n), call.data(n).shape) for n in first]
        both = call.op(parts, *call.args[1:], **call.kwargs)
        return result, masks.tidy([masks.compress(both, exact=True)])
    rest = [_nest(a, call.data) for a in call.args[1:]]
    if call.name in _TWO:
        parts = [masks.full(call.mask(n), call.data(n).shape) for n in call.args[:2]]
        both = call.op(*parts, *rest[1:])
        return result, masks.tidy([masks.compress(both, exact=True)])
    if call.name == "constant_pad_nd":
        return result, masks.tidy(_padded(factor, rest[0]) for factor in call.mask(first))
    shape = call.data(first).shape
    kwargs = {k: _nest(v, call.data) for k, v in call.kwargs.items()}

    def op(factor: Tensor) -> Any:
        return call.op(factor, *rest, **kwargs)

    if isinstance(result, list | tuple):
        found = [[masks.compress(part, exact=True) for part in op(f.expand(shape))] for f in call.mask(first)]
        return [(r, masks.tidy(f[i] for f in found)) for i, r in enumerate(result)]
    return result, masks.moved(call.mask(first), shape, op, exact)


def _padded(factor: Tensor, pads: list[int]) -> Tensor:
    """What padding adds is nobody's: present, unless it lies in a row that is absent or meets something absent later."""
    own = list(pads)
    for i in range(len(own) // 2):
        if factor.shape[factor.dim() - 1 - i] == 1:
            own[2 * i] = own[2 * i + 1] = 0
    padded: Tensor = torch.ops.aten.constant_pad_nd.default(factor, own, 1)
    return padded


def _factory(call: Op) -> Any:
    return call.outputs(call.run(call.data), ())


def _product(call: Op) -> Any:
    """mm and kin: absent entries count as zero; an output is present if its row and its column are."""
    result = call.run(call.zeroed)
    bias, left, right = (None, *call.args[:2]) if call.name in ("mm", "bmm", "mv", "dot") else call.args[:3]
    rows = masks.any_along(call.mask(left), [call.data(left).dim() - 1])
    if call.name in ("mv", "addmv", "dot"):
        return result, tuple(f.squeeze(-1) for f in rows) if call.name != "dot" else ()
    columns = masks.any_along(call.mask(right), [call.data(right).dim() - 2])
    extra = masks.aligned(call.mask(bias), result.dim()) if bias is not None else ()
    if call.name == "addbmm":
        rows, columns = masks.any_along(rows, [0], keepdim=False), masks.any_along(columns, [0], keepdim=False)
    return result, masks.tidy([*rows, *columns, *extra])


def _linear(call: Op) -> Any:
    result = call.run(call.zeroed)
    x, weight = call.args[:2]
    rows = masks.any_along(call.mask(x), [call.data(x).dim() - 1])
    filters = masks.any_along(call.mask(weight), [1], keepdim=False)
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return result, masks.tidy([*rows, *masks.aligned(filters, result.dim()), *masks.aligned(call.mask(bias), result.dim())])


def _convolution(call: Op) -> Any:
    x, weight, bias = call.args[:3]
    result = call.run(call.zeroed)
    groups, w = call.args[8], call.data(weight)
    present = masks.full(call.mask(weight), w.shape)
    if call.args[6]:  # transposed: [C, O/g, ...], each group its own block of rows
        filters = present.reshape(groups, w.shape[0] // groups, *w.shape[1:]).flatten(3).any(dim=3).any(dim=1).flatten()
    else:
        filters = present.flatten(1).any(dim=1)
    if masks.varies(call.mask(x), range(2, result.dim())):
        raise _refusal(call, "presence varies over spatial dims")
    batch = masks.any_along(call.mask(x), range(1, result.dim()))
    wide = filters.reshape(1, -1, *(1,) * (result.dim() - 2))
    vector = [f.reshape(wide.shape) for f in call.mask(bias)]
    return result, masks.tidy([wide, *vector, *batch])


def _attention(call: Op) -> Any:
    q, k, v = call.args[:3]
    parts = [call.zeroed(n) for n in (q, k, v)]
    name = call.name
    bias = call.kwargs.get("attn_mask") if "efficient" not in name else call.args[3]
    causal_at = 5 if "efficient" in name else 4
    causal = bool(call.args[causal_at]) if len(call.args) > causal_at else bool(call.kwargs.get("is_causal", False))
    scale = call.kwargs.get("scale")
    if scale is None:  # the op derives it from the head dim, so from the dims that are present
        count = int(masks.counted(call.mask(q), parts[0].shape, [3]).max()) if call.mask(q) else parts[0].shape[3]
        scale = 1 / math.sqrt(count)
    logits = parts[0] @ parts[1].transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + call.data(bias).to(logits.dtype)
    for factor in masks.any_along(call.mask(k), [3]):
        logits = logits.masked_fill(~factor.transpose(-2, -1), -math.inf)
    if causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).tril().logical_not(), -math.inf)
    result = torch.softmax(logits, dim=-1) @ parts[2]
    rows = masks.any_along(call.mask(q), [3])
    columns = masks.any_along(call.mask(v), [2])
    rest = [(None, ())] * (len(call.node.meta["spec"]) - 1)
    return [(result, masks.tidy([*rows, *columns])), *rest]


def _embedding(call: Op) -> Any:
    result = call.run(call.data)
    if masks.varies(call.mask(call.args[0]), [0]):
        raise _refusal(call, "rows of an embedding were removed")
    return result, tuple(f.reshape((1,) * (result.dim() - 1) + (-1,)) for f in call.mask(call.args[0]))


def _dims(call: Op, position: int = 1) -> list[int]:
    ndim = call.data(call.args[0]).dim()
    names = [a.name for a in call.node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
    bound = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return [d % ndim for d in dims] if dims else list(range(ndim))


def _reduction(call: Op) -> Any:
    """Sums read absent entries as zero, means and variances count the present ones, extrema skip the absent ones."""
    x = call.args[0]
    data, mask = call.values[x]
    dims = _dims(call)
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
        elif name in ("amax", "amin"):
            worst = -math.inf if name == "amax" else math.inf
            filled = data.masked_fill(~masks.full(mask, data.shape), worst)
            result = call.op(filled, *call.args[1:], **call.kwargs)
        elif name in ("norm", "linalg_vector_norm"):
            result = call.run(lambda item: zero if item is x else call.data(item))
        elif name in ("var", "var_mean", "std", "std_mean"):
            result = _variance(call, zero, mask, count, dims, keep)
        else:
            raise _refusal(call, "it runs over dims that lost entries")
    passed = masks.any_along(mask, dims, keepdim=keep)
    if isinstance(result, list | tuple):
        return [(r, passed) for r in result]
    return result, passed


def _variance(call: Op, zero: Tensor, mask: Mask, count: Tensor, dims: list[int], keep: bool) -> Any:
    correction = call.kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    if len(call.args) > 2 and isinstance(call.args[2], bool):
        correction = int(call.args[2])
    mean = zero.sum(dims, keepdim=True) / count
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / (count - correction).clamp_min(0)
    value = spread.sqrt() if call.name.startswith("std") else spread
    value, mean = (value, mean) if keep else (value.squeeze(dims), mean.squeeze(dims))
    return (value, mean) if call.name.endswith("_mean") else value


def _softmax(call: Op) -> Any:
    x, dim = call.args[0], call.args[1] % call.data(call.args[0]).dim()
    data, mask = call.values[x]
    if masks.varies(mask, [dim]):
        data = data.masked_fill(~masks.full(mask, data.shape), -math.inf)
        log = "log" in call.name
        return (torch.log_softmax(data, dim) if log else torch.softmax(data, dim)), mask
    return call.run(call.data), mask


def _weight_norm(call: Op) -> Any:
    v, g = call.args[:2]
    data, mask = call.data(v), call.mask(v)
    keep = call.args[2] if len(call.args) > 2 else 0
    dims = [d for d in range(data.dim()) if d != keep]
    norm = (masks.zeroed(data, mask) ** 2).sum(dims, keepdim=True).sqrt()
    both = masks.tidy([*mask, *masks.aligned(call.mask(g), data.dim())])
    return [(data * call.data(g) / norm, both), (norm, masks.any_along(both, dims))]


def _layer_norm(call: Op) -> Any:
    x, shape = call.args[:2]
    data, mask = call.values[x]
    rms = "rms" in call.name
    weight, bias, eps = (call.args[2], None, call.args[3]) if rms else call.args[2:5]
    dims = list(range(data.dim() - len(shape), data.dim()))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    result = _normalised(data, mask, dims, eps, center=not rms)
    factors = list(mask)
    if weight is not None:
        result = result * call.data(weight)
        factors += masks.aligned(call.mask(weight), data.dim())
    if bias is not None:
        result = result + call.data(bias)
        factors += masks.aligned(call.mask(bias), data.dim())
    tuple_out = isinstance(call.node.meta["spec"], tuple)
    return [(result, masks.tidy(factors)), (None, ()), (None, ())] if tuple_out else (result, masks.tidy(factors))


def _normalised(data: Tensor, mask: Mask, dims: list[int], eps: float, center: bool = True) -> Tensor:
    count = masks.counted(mask, data.shape, dims) if mask else math.prod(data.shape[d] for d in dims)
    zero = masks.zeroed(data, mask)
    mean = zero.sum(dims, keepdim=True) / count if center else torch.zeros((), dtype=data.dtype)
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / count
    return (zero - mean) / torch.sqrt(spread + eps)


def _group_norm(call: Op) -> Any:
    x, weight, bias = call.args[:3]
    groups, eps = call.args[6], call.args[7]
    data, mask = call.values[x]
    cut = (data.shape[0], groups, data.shape[1] // groups, *data.shape[2:])
    grid = masks.moved(mask, data.shape, lambda f: f.contiguous().reshape(cut), exact=True)
    result = _normalised(data.reshape(cut), grid, list(range(2, len(cut))), eps).reshape(data.shape)
    factors = list(mask)
    for vector, scale in ((weight, True), (bias, False)):
        if vector is not None:
            wide = (1, -1, *(1,) * (data.dim() - 2))
            value = call.data(vector).reshape(wide)
            result = result * value if scale else result + value
            factors += [f.reshape(wide) for f in call.mask(vector)]
    return [(result, masks.tidy(factors)), (None, ()), (None, ())]


def _window(call: Op) -> Any:
    """Pooling and resampling: batch and channels pass."""
    x = call.args[0]
    data, mask = call.values[x]
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    moved_dims = [d for d in range(data.dim()) if d >= data.dim() - (3 if "3d" in call.name else 1 if "1d" in call.name else 2)]
    if masks.varies(mask, moved_dims) or first.dim() != data.dim():
        raise _refusal(call, "it runs over dims that lost entries")
    return call.outputs(result, mask)


def _whole(call: Op) -> Any:
    """Ops that pick, order or do anything else: fine along dims that are whole."""
    if call.name in ("max", "min") and isinstance(call.args[1] if len(call.args) > 1 else None, fx.Node):
        return _elementwise(call)
    x = call.args[0] if call.args else None
    if isinstance(x, fx.Node) and call.masked and len(call.node.all_input_nodes) == 1 and family(call.name) is Family.REDUCTION:
        data, mask = call.values[x]
        dims = _dims(call)
        if not masks.varies(mask, dims):
            result = call.run(call.data)
            first = result[0] if isinstance(result, list | tuple) else result
            passed = masks.any_along(mask, dims, keepdim=first.dim() == data.dim())
            return [(r, passed) for r in result] if isinstance(result, list | tuple) else (result, passed)
    if call.masked:
        raise _refusal(call, "it reads a tensor that lost entries, and the proof does not know how")
    result = call.run(call.data)
    return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())


def _refusal(call: Op, why: str) -> ProofError:
    return ProofError(
        f"the cut cannot be proved at op {call.name}", where=where(call.node), why=why,
        fix="keep the layer with ignore=[...], or report the model: a rule is missing",
    )  # fmt: skip


BY_FAMILY: Mapping[Family, Callable[[Op], Any]] = {
    Family.MOVEMENT: _movement,
    Family.ELEMENTWISE: _elementwise,
    Family.CONTRACTION: _product,
    Family.REDUCTION: _whole,
    Family.FACTORY: _factory,
    Family.OPAQUE: _whole,
}

_REDUCTIONS = """
mean sum nansum amax amin var std var_mean std_mean norm linalg_vector_norm""".split()
_WINDOWS = """
max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool1d avg_pool2d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d""".split()
_ATTENTIONS = """
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable""".split()
_NORMS = """
native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
_batch_norm_no_update""".split()

SEMANTICS: Mapping[str, Callable[[Op], Any]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys(_NORMS, _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("_prelu_kernel", "prelu"), _prelu),
    "native_group_norm": _group_norm,
    "glu": _gated,
    "_weight_norm_interface": _weight_norm,
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": _linear,
    "embedding": _embedding,
}
