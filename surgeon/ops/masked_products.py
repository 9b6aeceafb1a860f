"""What each op computes when some entries of its operands are absent: the meaning that a cut must keep.

One function per kind of op: `Op` at work in, (data, mask) out. Sums read absent entries as zero,
normalisations run over those that are present, element-wise ops pass absence on, and an op that could do none
of these refuses. This knows nothing of ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.queries import is_read
from surgeon.ops import masked_movement as moves
from surgeon.ops import masked_reduction as normalise
from surgeon.ops import masks
from surgeon.ops.masked_op import Op, refusal
from surgeon.ops.table import FUSED_ATTENTION, Family, family


def _elementwise(call: Op) -> Any:
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    factors = [f for n in call.node.all_input_nodes for f in masks.aligned(call.mask(n), first.dim())]
    return call.outputs(result, masks.tidy(factors))


def _gated(call: Op) -> Any:
    data, mask = call.values[call["self"]]
    dim = call["dim"] % data.dim()
    first = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[0], exact=True)
    second = masks.moved(mask, data.shape, lambda f: f.chunk(2, dim)[1], exact=True)
    return call.run(call.data), masks.tidy([*first, *second])


def _batch_norm(call: Op) -> Any:
    """In training mode each channel is normalised by what is present of it (standardised weights are written
    so).
    """
    data, mask = call.values[call["input"]]
    ndim = data.dim()
    others = [d for d in range(ndim) if d != 1]
    if call.get("training") is True and masks.varies(mask, others):
        plain = normalise.normalised(data, mask, others, call["eps|epsilon"])
        for vector, scale in ((call["weight"], True), (call["bias"], False)):
            if vector is not None:
                wide = call.data(vector).reshape(1, -1, *(1,) * (ndim - 2))
                plain = plain * wide if scale else plain + wide
        result: Any = (plain, None, None)
    else:
        result = call.run(call.data)
    factors = list(mask)
    for vector in map(call.get, ("weight", "bias", "running_mean", "running_var")):
        factors += [f.reshape(1, -1, *(1,) * (ndim - 2)) for f in call.mask(vector)]
    return call.outputs(result, masks.tidy(factors))


def _prelu(call: Op) -> Any:
    x, weight = call["self"], call["weight"]
    result = call.run(call.data)
    wide = [
        f if f.dim() == result.dim() else f.reshape(1, -1, *(1,) * (result.dim() - 2))
        for f in call.mask(weight)
    ]
    return result, masks.tidy([*call.mask(x), *wide])


def _factory(call: Op) -> Any:
    return call.outputs(call.run(call.data), ())


def _product(call: Op) -> Any:
    """mm and kin: absent entries count as zero; an output is present if its row and its column are."""
    result = call.run(call.zeroed)
    added = call.name.startswith("add") or call.name == "baddbmm"
    bias = call["self"] if added else None
    left = call["mat1|batch1|mat" if added else "self"]
    right = call["mat2|batch2|vec|tensor|other|vec2"]
    rows = masks.any_along(call.mask(left), [call.data(left).dim() - 1])
    if call.name in ("dot", "vdot"):
        return result, ()
    if call.name in ("mv", "addmv"):
        return result, tuple(f.squeeze(-1) for f in rows)
    columns = masks.any_along(call.mask(right), [call.data(right).dim() - 2])
    extra = masks.aligned(call.mask(bias), result.dim()) if bias is not None else ()
    if call.name == "addbmm":
        rows, columns = (
            masks.any_along(rows, [0], keepdim=False),
            masks.any_along(columns, [0], keepdim=False),
        )
    return result, masks.tidy([*rows, *columns, *extra])


def _distances(call: Op) -> Any:
    """Absent entries are no distance apart; a distance is present if both of its rows are."""
    result = call.run(call.zeroed)
    factors: list[Tensor] = []
    for node, turned in zip((call["x1"], call["x2"]), (False, True), strict=True):
        last = call.data(node).dim() - 1
        rows = masks.any_along(call.mask(node), [last])
        factors += masks.aligned(tuple(f.transpose(-1, -2) for f in rows) if turned else rows, result.dim())
    return result, masks.tidy(factors)


def _trilinear(call: Op) -> Any:
    """Three operands, with dims of size 1 put in, multiplied and summed: absent entries count as zero."""
    factors: list[Tensor] = []
    summed = list(call["sumdim"])
    for number in "123":
        node, expand = call[f"i{number}"], call[f"expand{number}"]
        wide = call.mask(node)
        for dim in sorted(expand):
            wide = tuple(f.unsqueeze(dim) for f in wide)
        factors += masks.any_along(wide, summed, keepdim=False)
    return call.run(call.zeroed), masks.tidy(factors)


def _complex_parts(call: Op) -> Any:
    """[..., 2] and [...] of complex numbers."""
    mask, ndim = call.mask(call["self"]), call.data(call["self"]).dim()
    if call.name == "view_as_real":
        return call.run(call.data), tuple(f.unsqueeze(-1) for f in mask)
    if masks.varies(mask, [ndim - 1]):
        raise refusal(call, "a real or an imaginary part was removed")
    return call.run(call.data), tuple(f.squeeze(-1) for f in mask)


def _linear(call: Op) -> Any:
    result = call.run(call.zeroed)
    x, weight = call["input"], call["weight"]
    rows = masks.any_along(call.mask(x), [call.data(x).dim() - 1])
    filters = masks.any_along(call.mask(weight), [1], keepdim=False)
    bias = call["bias"]
    return result, masks.tidy(
        [*rows, *masks.aligned(filters, result.dim()), *masks.aligned(call.mask(bias), result.dim())]
    )


def _convolution(call: Op) -> Any:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    result = call.run(call.zeroed)
    groups, w = call["groups"], call.data(weight)
    present = masks.full(call.mask(weight), w.shape)
    if call["transposed"]:  # transposed: [C, O/g, ...], each group its own block of rows
        filters = (
            present.reshape(groups, w.shape[0] // groups, *w.shape[1:])
            .flatten(3)
            .any(dim=3)
            .any(dim=1)
            .flatten()
        )
    else:
        filters = present.flatten(1).any(dim=1)
    fixed = [d for d in range(2, result.dim()) if not _passes(call, w, d)]
    if masks.varies(call.mask(x), fixed):
        raise refusal(call, "presence varies over spatial dims")
    batch = masks.any_of_groups(call.mask(x), 1, groups, result.shape[1])
    wide = filters.reshape(1, -1, *(1,) * (result.dim() - 2))
    vector = [f.reshape(wide.shape) for f in call.mask(bias)]
    return result, masks.tidy([wide, *vector, *batch])


def _passes(call: Op, weight: Tensor, dim: int) -> bool:
    """Whether the places along a spatial dim do not mix: a kernel of one, no stride and no padding."""
    stride, padding = (list(call[name]) * weight.dim() for name in ("stride", "padding"))
    return weight.shape[dim] == 1 and stride[dim - 2] == 1 and padding[dim - 2] == 0


def _attention(call: Op) -> Any:
    q, k, v = call["query"], call["key"], call["value"]
    parts = [call.zeroed(n) for n in (q, k, v)]
    times = parts[0].shape[1] // parts[1].shape[1]  # heads of q that one head of k and v serves
    parts[1:] = [part.repeat_interleave(times, dim=1) for part in parts[1:]]
    k_mask, v_mask = (_served(call.mask(n), times) for n in (k, v))
    bias, causal = call.get("attn_bias|attn_mask"), bool(call["is_causal"])
    scale = call["scale"]
    if scale is None:  # the op derives it from the head dim, so from the dims that are present
        count = (
            int(masks.counted(call.mask(q), parts[0].shape, [3]).max()) if call.mask(q) else parts[0].shape[3]
        )
        scale = 1 / math.sqrt(count)
    logits = parts[0] @ parts[1].transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + call.data(bias).to(logits.dtype)
    for factor in masks.any_along(k_mask, [3]):
        logits = logits.masked_fill(~factor.transpose(-2, -1), -math.inf)
    if causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).tril().logical_not(), -math.inf)
    result = torch.softmax(logits, dim=-1) @ parts[2]
    rows = masks.any_along(call.mask(q), [3])
    columns = masks.any_along(v_mask, [2])
    rest = [(None, ())] * (len(call.node.meta["spec"]) - 1)
    return [(result, masks.tidy([*rows, *columns])), *rest]


def _served(mask: masks.Mask, times: int) -> masks.Mask:
    return tuple(f.repeat_interleave(times, dim=1) if f.shape[1] > 1 else f for f in mask)


def _embedding(call: Op) -> Any:
    result = call.run(call.data)
    if masks.varies(call.mask(call["weight"]), [0]):
        raise refusal(call, "rows of an embedding were removed")
    ndim = (result[0] if isinstance(result, list | tuple) else result).dim()
    return call.outputs(
        result, tuple(f.reshape((1,) * (ndim - 1) + (-1,)) for f in call.mask(call["weight"]))
    )


def _unfolded(call: Op) -> Any:
    """im2col and col2im: a channel and all its kernel places are present or not."""
    result, mask = call.run(call.zeroed), call.mask(call["self"])
    if masks.varies(mask, range(2, call.data(call["self"]).dim())):
        raise refusal(call, "presence varies over spatial dims")
    times = math.prod(call["kernel_size"])
    found = []
    for factor in mask:
        if factor.shape[1] == 1:
            own = factor.flatten(2)[..., :1]
        elif call.name == "im2col":
            own = factor.flatten(2)[..., :1].repeat_interleave(times, dim=1)
        else:
            own = factor.reshape(factor.shape[0], -1, times).any(dim=2, keepdim=True)
        found.append(own.reshape(*own.shape[:2], *(1,) * (result.dim() - 2)))
    return result, masks.tidy(found)


def _sampled(call: Op) -> Any:
    """grid_sample: samples and channels are present or not."""
    x, grid = call["input"], call["grid"]
    if masks.varies(call.mask(x), range(2, call.data(x).dim())) or masks.varies(
        call.mask(grid), range(1, call.data(grid).dim())
    ):
        raise refusal(call, "presence varies over places")
    return call.run(call.zeroed), masks.tidy([*call.mask(x), *call.mask(grid)])


def _index_put(call: Op) -> Any:
    x, indices, values = call["self"], call["indices"], call["values"]
    result = call.run(call.data)
    last = 0
    for place, tensor in enumerate(indices):
        if tensor is not None:
            last = place + (call.data(tensor).dim() if call.data(tensor).dtype is torch.bool else 1)
    if masks.varies(call.mask(x), range(last)):
        raise refusal(call, "entries that are written by index were removed")
    behind = [f for f in call.mask(values) if f.dim() >= result.dim() - last]
    factors = [f.reshape((1,) * last + tuple(f.shape[f.dim() - (result.dim() - last) :])) for f in behind]
    return result, masks.tidy([*call.mask(x), *factors])


def _index_add(call: Op) -> Any:
    x, dim, index, source = (call[name] for name in ("self", "dim", "index", "source|src|value"))
    operands = (
        [x, source] if call.name.startswith("index") else [x, index, source]
    )  # scatter: an index for each entry
    if any(masks.varies(call.mask(operand), [dim % call.data(x).dim()]) for operand in operands):
        raise refusal(call, "entries that are written by index were removed")
    return call.run(call.data), masks.tidy([factor for operand in operands for factor in call.mask(operand)])


def _grouped_product(call: Op) -> Any:
    x, weight = call["self"], call["mat2"]
    rows = masks.any_along(call.mask(x), [1])
    columns = [f.squeeze(0) for f in masks.any_along(call.mask(weight), [1]) if f.shape[0] == 1]
    return call.run(call.zeroed), masks.tidy([*rows, *columns])


def _whole(call: Op) -> Any:
    """Ops that pick, order or do anything else: fine along dims that are whole."""
    if (
        call.name in ("max", "min") and set(call.arguments) == {"self"} and call.masked
    ):  # the greatest of all that are present
        data, mask = call.values[call["self"]]
        least = -math.inf if call.name == "max" else math.inf
        return call.on(call["self"], data.masked_fill(~masks.full(mask, data.shape), least)), ()
    if call.name in ("max", "min") and "other" in call.arguments:
        return _elementwise(call)
    if call.name in ("max", "min") and call.masked and not is_read(call.node, 1):  # the values alone
        return normalise.extremum(call)
    x = next(iter(call.arguments.values()), None)
    if (
        isinstance(x, fx.Node)
        and call.masked
        and len(call.node.all_input_nodes) == 1
        and family(call.name) is Family.REDUCTION
    ):
        data, mask = call.values[x]
        dims = normalise.reduced_dims(call)
        if not masks.varies(mask, dims):
            result = call.run(call.data)
            first = result[0] if isinstance(result, list | tuple) else result
            passed = masks.any_along(mask, dims, keepdim=first.dim() == data.dim())
            return [(r, passed) for r in result] if isinstance(result, list | tuple) else (result, passed)
    if call.masked:
        raise refusal(call, "it reads a tensor that lost entries, and the proof does not know how")
    result = call.run(call.data)
    return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())


BY_FAMILY: Mapping[Family, Callable[[Op], Any]] = {
    Family.MOVEMENT: moves.movement,
    Family.ELEMENTWISE: _elementwise,
    Family.CONTRACTION: _product,
    Family.REDUCTION: _whole,
    Family.FACTORY: _factory,
    Family.OPAQUE: _whole,
}

_REDUCTIONS = """
mean sum nansum amax amin var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all""".split()
_WINDOWS = """
max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool1d avg_pool2d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d""".split()
_NORMS = """
native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
_batch_norm_no_update""".split()

SEMANTICS: Mapping[str, Callable[[Op], Any]] = {
    **dict.fromkeys(_REDUCTIONS, normalise.reduction),
    **dict.fromkeys(_WINDOWS, normalise.window),
    **dict.fromkeys(FUSED_ATTENTION, _attention),
    **dict.fromkeys(_NORMS, _batch_norm),
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), normalise.softmax
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), normalise.layer_norm),
    **dict.fromkeys(("_prelu_kernel", "prelu"), _prelu),
    "native_group_norm": normalise.group_norm,
    "glu": _gated,
    "im2col": _unfolded,
    "col2im": _unfolded,
    "grid_sampler_2d": _sampled,
    "grid_sampler_3d": _sampled,
    "index_put": _index_put,
    "index_add": _index_add,
    "index_copy": _index_add,
    "scatter": _index_add,
    "scatter_add": _index_add,
    "scatter_reduce": _index_add,
    "_unsafe_index_put": _index_put,
    "_grouped_mm": _grouped_product,
    "_weight_norm_interface": normalise.weight_norm,
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": _linear,
    "_trilinear": _trilinear,
    "_cdist_forward": _distances,
    "_euclidean_dist": _distances,
    "view_as_real": _complex_parts,
    "view_as_complex": _complex_parts,
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), _embedding),
}
