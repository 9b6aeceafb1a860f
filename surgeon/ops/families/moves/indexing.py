"""Entries found by index tensors, read or written: the dims that are looked up stay whole, the others pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from surgeon.ops import masks
from surgeon.ops.context import OpContext, beside, broadcast
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp, refusal
from surgeon.ops.table import Family, Trait, op, op_name


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
        dim = int(ctx["dim"]) % max(1, len(shape))
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
            for dim_ids in (axes.pop(d, None), other):
                if dim_ids is not None:
                    ctx.constraints.freeze(dim_ids, "meets a tensor whose size here is fixed")
    return axes


def embedding(ctx: OpContext) -> ValueIds:
    """weight [V, D] looked up by ids [...]: rows are data and stay; D passes."""
    weight, index = ctx["weight"], ctx["indices"]
    axes = ctx.freeze(ctx.axes(weight), [0], "is looked up by index")
    ctx.constraints.freeze_all(ctx.axes(index), "is used as an index")
    ndim = len(ctx.out)
    return {ndim - 1: axes[1].reshape((1,) * (ndim - 1) + (-1,))} if 1 in axes else {}


def embedding_bag(ctx: OpContext) -> tuple[ValueIds, ...]:
    """As `embedding`, the rows of each bag put together; which were the greatest is of the same shape."""
    axes = ctx.freeze(ctx.axes(ctx["weight"]), [0], "is looked up by index")
    for other in ctx.tensors:
        if other is not ctx["weight"]:
            ctx.constraints.freeze_all(ctx.axes(other), "is used as an index, or one for each row")
    out = {1: axes[1]} if 1 in axes else {}
    return tuple(out if spec is not None and spec.shape == ctx.out else {} for spec in ctx.node.meta["spec"])


# -- what is computed when entries are gone -----------------------------------------------------------------


def put_absent(call: MaskedOp) -> Any:
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


def added_absent(call: MaskedOp) -> Any:
    x, dim, index, source = (call[name] for name in ("self", "dim", "index", "source|src|value"))
    operands = (
        [x, source] if call.name.startswith("index") else [x, index, source]
    )  # scatter: an index for each entry
    if any(masks.varies(call.mask(operand), [dim % call.data(x).dim()]) for operand in operands):
        raise refusal(call, "entries that are written by index were removed")
    return call.run(call.data), masks.tidy([factor for operand in operands for factor in call.mask(operand)])


def embedding_absent(call: MaskedOp) -> Any:
    result = call.run(call.data)
    if masks.varies(call.mask(call["weight"]), [0]):
        raise refusal(call, "rows of an embedding were removed")
    ndim = (result[0] if isinstance(result, list | tuple) else result).dim()
    return call.outputs(
        result, tuple(f.reshape((1,) * (ndim - 1) + (-1,)) for f in call.mask(call["weight"]))
    )


def _rows(ctx: OpContext) -> dict[str, list[int]]:
    """Of a table that is looked up."""
    return {"weight": [0]}


op("index _unsafe_index index_select gather", Family.MOVEMENT, ids=index)
op("index_add index_copy", Family.ELEMENTWISE, ids=index_add, absent=added_absent)
op("scatter scatter_add scatter_reduce", Family.ELEMENTWISE, ids=scatter, absent=added_absent)
op("index_put _unsafe_index_put", Family.MOVEMENT, ids=index_put, absent=put_absent)
op(
    "embedding",
    Family.CONTRACTION,
    "weight:vj, indices:R -> Rj",
    ids=embedding,
    absent=embedding_absent,
    mixes=_rows,
    traits={Trait.LOOKS_UP},
)
op(
    "_embedding_bag _embedding_bag_forward_only",
    Family.CONTRACTION,
    ids=embedding_bag,
    absent=embedding_absent,
    mixes=_rows,
    traits={Trait.LOOKS_UP},
)
