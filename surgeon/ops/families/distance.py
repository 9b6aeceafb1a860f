"""Distances of rows from rows: the dim along which they differ is summed over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.ops import masks
from surgeon.ops.context import OpContext
from surgeon.ops.families.contraction import contraction, product_absent
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp, refusal
from surgeon.ops.table import Family, op


def pairs(ctx: OpContext) -> ValueIds:
    """Distances of all rows from each other: each row has its places in the result."""
    axes = ctx.freeze(ctx.axes(ctx["self"]), [0], "its rows are compared with each other")
    if 1 in axes:
        ctx.constraints.reduced(ctx.constraints.collapse(axes[1], 0))
    return {}


# -- what is computed when entries are gone -----------------------------------------------------------------


def pairs_absent(call: MaskedOp) -> Any:
    """What is absent of all rows adds nothing to their distances."""
    if masks.varies(call.mask(call["self"]), [0]):
        raise refusal(call, "rows that are compared with others were removed")
    return call.run(call.zeroed), ()


def euclidean_in_float64(x1: Tensor, x2: Tensor) -> Tensor:
    """Distances by differences: by products, those of rows that are close lose half of their digits."""
    return torch.cdist(x1, x2, compute_mode="donot_use_mm_for_euclid_dist")


op(
    "_euclidean_dist", Family.REDUCTION, "x1:Bik, x2:Bjk -> Bij", in_float64=euclidean_in_float64,
    ids=contraction, absent=product_absent, mixes=lambda c: {"x1": [-1], "x2": [-1]},
)  # fmt: skip
op(
    "_cdist_forward", Family.REDUCTION, "x1:Bik, x2:Bjk -> Bij",  # of all rows i from all rows j
    ids=contraction, absent=product_absent, mixes=lambda c: {"x1": [-1], "x2": [-1]},
)  # fmt: skip
op("_pdist_forward", Family.REDUCTION, ids=pairs, absent=pairs_absent, mixes=lambda c: {"self": [0, 1]})
