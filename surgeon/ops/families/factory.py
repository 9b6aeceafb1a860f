"""Tensors made of constants.

Of one repeated constant, each entry gets an id of no slot, and follows what it meets. Entries that differ by position are
fixed.
"""

from __future__ import annotations

from typing import Any

from surgeon.ops.context import OpContext
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.table import Family, Trait, defaults, op


def repeated(ctx: OpContext) -> ValueIds:
    """Of one repeated constant: its dims follow whatever they meet, so each entry gets an id of no slot."""
    return unowned_ids(ctx, ctx.out, range(len(ctx.out)))


def unowned_ids(ctx: OpContext, shape: tuple[int, ...], dims: object) -> ValueIds:
    """Fresh ids along each of `dims`, tied to nothing."""
    axes: ValueIds = {}
    for dim in dims:  # type: ignore[attr-defined]  # any iterable of ints
        if shape[dim] > 1:
            axes[dim] = ctx.constraints.new(shape[dim]).reshape(
                [-1 if d == dim else 1 for d in range(len(shape))]
            )
            ctx.constraints.mark_unowned(axes[dim])
    return axes


def fixed(ctx: OpContext) -> ValueIds:
    """Entries that differ by position (arange, random numbers): none can go without changing the rest."""
    return {}


def constant_absent(call: MaskedOp) -> Any:
    return call.outputs(call.run(call.data), ())


def empty_absent(call: MaskedOp) -> Any:
    """Memory as it was found: zeros are as good as anything, and the same in each run."""
    return call.outputs(call.run(call.data).zero_(), ())


defaults(Family.FACTORY, absent=constant_absent)

op("zeros ones full new_zeros new_ones new_full", Family.FACTORY, ids=repeated)
op("empty", Family.FACTORY, ids=repeated, absent=empty_absent, traits={Trait.INCIDENTAL})
op("new_empty empty_strided new_empty_strided", Family.FACTORY, ids=repeated, absent=empty_absent)
op(
    "arange linspace logspace rand randn randint randperm scalar_tensor tril_indices triu_indices hann_window",
    Family.FACTORY,
    ids=fixed,
)
