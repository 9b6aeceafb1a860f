"""Tensors made of one repeated constant: their dims follow whatever they meet, so each entry gets an id of
nobody's slot.

Tensors whose entries differ by position (arange, random numbers, eye) are fixed: an entry cannot go without
changing the rest.
"""

from __future__ import annotations

from surgeon.ops.ids import ValueIds
from surgeon.ops.table import Family, OpContext, rule


@rule(
    Family.FACTORY,
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "empty_strided",
)
def repeated(ctx: OpContext) -> ValueIds:
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


@rule(
    Family.FACTORY, "arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "scalar_tensor",
    "tril_indices", "triu_indices", "hann_window",
)  # fmt: skip
def fixed(ctx: OpContext) -> ValueIds:
    return {}
