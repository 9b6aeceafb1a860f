"""Attention in one op: softmax(q k^T / sqrt(d) + mask) v.

torch has a kernel for each backend and picks one as the model runs. A kernel of another library is one line:
`attention("mylib::attention")`, with letters if its arguments have other names.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from surgeon.ops import masks
from surgeon.ops.context import OpContext, opaque
from surgeon.ops.families.contraction import contraction
from surgeon.ops.masked_op import MaskedOp, unchanged
from surgeon.ops.table import Family, Trait, bound, op

LETTERS = "query:n(hg)qd, key:nhkd, attn_bias|attn_mask:+ -> n(hg)qk, value:nhke -> n(hg)qe"


def attention_ids(ctx: OpContext) -> Any:
    """q [N, H, Q, D], k [N, K, M, D], v [N, K, M, E]: heads and dims are tied.

    K divides H: each head of k and v serves H/K heads of q in a row (grouped queries).
    """
    products = bound(ctx.node)
    if products is None:
        return opaque(ctx)
    out = contraction(ctx)
    query, _, value = (ctx[operand.name] for operand in products.operands)
    if ctx.shape(query)[3] == ctx.shape(value)[3]:  # the fused kernels take one head dim
        both = [ctx.axes(query), ctx.axes(value)]
        if all(3 in axes for axes in both):
            rows = [axes[3].reshape(-1, axes[3].shape[-1]) for axes in both]
            ctx.constraints.balance(np.concatenate(rows), 1)
        else:
            for axes in both:
                ctx.freeze(axes, [3], "shares its head size with queries or values whose size here is fixed")
    return out


# -- what is computed when entries are gone -----------------------------------------------------------------


def attention_absent(call: MaskedOp) -> Any:
    """Queries by queries: absent keys get no share, absent dims add nothing, and the scale is that of the dims that are
    there.
    """
    products = bound(call.node)
    if products is None:
        return unchanged(call)
    q, k, v = (call[operand.name] for operand in products.operands)
    parts = [call.zeroed(n) for n in (q, k, v)]
    times = parts[0].shape[1] // parts[1].shape[1]  # heads of q that one head of k and v serves
    parts[1:] = [part.repeat_interleave(times, dim=1) for part in parts[1:]]
    k_mask, v_mask = (_served(call.mask(n), times) for n in (k, v))
    bias = next((call[operand.name] for operand in products.steps[0].added), None)
    scale = call.get("scale")
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
    if call.get("is_causal"):
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).tril().logical_not(), -math.inf)
    result = torch.softmax(logits, dim=-1) @ parts[2]
    rows = masks.any_along(call.mask(q), [3])
    columns = masks.any_along(v_mask, [2])
    found, several = (result, masks.tidy([*rows, *columns])), call.node.meta["spec"]
    return [found, *((None, ()) for _ in several[1:])] if isinstance(several, tuple) else found


def _served(mask: masks.Mask, times: int) -> masks.Mask:
    return tuple(f.repeat_interleave(times, dim=1) if f.shape[1] > 1 else f for f in mask)


def attention(names: str, letters: str = LETTERS) -> None:
    """Declare ops that are attention in one op.

    Args:
        letters: the names of queries, keys, values and (added to the scores) mask among its arguments, in this order.
            Whether it is causal, and its scale, are taken from `is_causal` and `scale` where it has them.
    """
    traits = {Trait.ATTENTION, Trait.SCORES}
    op(names, Family.CONTRACTION, letters, ids=attention_ids, absent=attention_absent, traits=traits)


attention("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention")
attention("_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention")
attention("_scaled_dot_product_fused_attention_overrideable")
