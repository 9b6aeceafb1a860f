"""Convolutions: products whose data is seen through windows. The kernel stays whole, and spatial dims that it mixes."""

from __future__ import annotations

from collections.abc import Sequence

from surgeon.graph.arguments import Arguments
from surgeon.ops.context import OpContext
from surgeon.ops.ids import ValueIds
from surgeon.ops.letters import Operand
from surgeon.ops.table import Family, bound, op


def whole_windows(ctx: OpContext, operand: Operand, axes: ValueIds) -> ValueIds:
    """Ids of what a convolution reads: its kernel stays whole, and dims along which its places mix."""
    mixed = mixed_places(ctx.arguments, operand, ctx.shape(ctx["weight"]))
    axes = ctx.freeze(axes, mixed, "is a spatial dim of a convolution")
    return ctx.freeze(axes, _kernel(operand), "is a kernel dim of a convolution")


def _kernel(operand: Operand) -> list[int]:
    return [i for i, dim in enumerate(operand.dims) if dim.letters[0].startswith("K")]


def _windows(ctx: OpContext) -> dict[str, list[int]]:
    """The spatial dims of the input that the kernel looks through, and all dims of the kernel."""
    products = bound(ctx.node)
    if products is None:
        return {}
    data, weight = products.operands
    return {"input": mixed_places(ctx.arguments, data, ctx.shape(ctx["weight"])), "weight": _kernel(weight)}


def mixed_places(given: Arguments, operand: Operand, weight: Sequence[int]) -> list[int]:
    """Spatial dims of an operand that a convolution does not work on place by place: by a kernel of one, without stride
    and padding.
    """
    places = [i for i, dim in enumerate(operand.dims) if dim.letters[0].startswith("P")]
    return [
        dim
        for dim in places
        if weight[dim] > 1 or _of_dim(given, "stride", dim) > 1 or _of_dim(given, "padding", dim)
    ]


def _of_dim(given: Arguments, name: str, dim: int) -> int:
    """A number for each spatial dim, or one for all."""
    return int(given[name][(dim - 2) % len(given[name])])


def _convolution_letters(given: Arguments) -> str:
    """Windows slide over the input; of a transposed convolution, over the result."""
    if given["transposed"]:
        return "input:n(gc)P, weight:(gc)oK, bias:+(go) -> n(go)<PK>"
    return "input:n(gc)<PK>, weight:(go)cK, bias:+(go) -> n(go)P"


op("convolution _convolution", Family.CONTRACTION, _convolution_letters, mixes=_windows)
