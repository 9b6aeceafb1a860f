"""Diagonals: an op picks, puts or keeps entries by where a row and a column have one number.

What stays of the main diagonal is the main diagonal of what stays, as long as rows and columns lose the same ones. Of
any other diagonal it is not, so its dims stay whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgeon.ops import masks
from surgeon.ops.context import OpContext, beside, meet
from surgeon.ops.families.factory import unowned_ids
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.side_by_side import repeats
from surgeon.ops.table import Family, op

_REASON = "a diagonal is read whose rows and columns are not the same"


def _plain(ctx: OpContext, name: str) -> ValueIds:
    """The ids of an operand, none of which vary along another dim: rows and columns change places."""
    found: ValueIds = {}
    for dim, ids in ctx.axes(ctx[name]).items():
        for other in range(ids.ndim):
            ids = ctx.constraints.collapse(ids, other) if other != dim else ids
        found[dim] = ids
    return found


def square(ctx: OpContext, axes: ValueIds, shape: tuple[int, ...], first: int, second: int) -> ValueIds:
    """The ids of a value with rows and columns of its main diagonal joined; frozen if it has none."""
    dims, offset = {first, second}, ctx.get("offset") or ctx.get("diagonal") or 0
    if offset or shape[first] != shape[second] or len(dims & set(axes)) == 1:
        axes = ctx.freeze(axes, dims, _REASON)
    if not dims <= set(axes):
        return axes
    line = meet(ctx.constraints, [axes[first], axes[second].swapaxes(first, second)])
    return {**axes, first: line, second: line.swapaxes(first, second)}


def _dims(ctx: OpContext, ndim: int) -> tuple[int, int]:
    return ctx["dim1"] % ndim, ctx["dim2"] % ndim


def diagonal(ctx: OpContext) -> ValueIds:
    """[.., n, .., n, ..] -> [.., n]: entries with one number along both dims."""
    x, ndim = ctx["self"], len(ctx.shape(ctx["self"]))
    first, second = _dims(ctx, ndim)
    axes = square(ctx, _plain(ctx, "self"), ctx.shape(x), first, second)
    order = [*(d for d in range(ndim) if d not in (first, second)), first, second]
    return {min(order.index(dim), ndim - 2): _line(ids.transpose(order)) for dim, ids in axes.items()}


def _line(ids: DimIds) -> DimIds:
    """Ids of [.., n, n] without the last dim; those along the rows and along the columns are the same."""
    found: DimIds = ids[..., 0] if ids.shape[-1] == 1 else ids[..., 0, :]
    return found


def diagonal_scatter(ctx: OpContext) -> ValueIds:
    """The same entries written to: what is written meets what is there."""
    base, part = ctx["self"], ctx["src"]
    ndim = len(ctx.out)
    first, second = _dims(ctx, ndim)
    axes = square(ctx, _plain(ctx, "self"), ctx.shape(base), first, second)
    own = _plain(ctx, "src")
    for dim in range(ndim - 1):
        others = [d for d in range(ndim) if d not in (first, second)]
        places = (first, second) if dim == ndim - 2 else (others[dim],)
        if not all(place in axes for place in places) or dim not in own:
            if ctx.shape(part)[dim] > 1:
                ctx.freeze(own, [dim], "meets a tensor whose size here is fixed")
                axes = ctx.freeze(axes, places, "meets a tensor whose size here is fixed")
            continue
        for place in places:
            other = first if place == second else second
            line = _spread(own[dim], *((place, other) if place in (first, second) else (first, second)))
            axes[place] = beside(ctx.constraints, [axes[place], line])
    return axes


def _spread(line: Any, first: int, second: int) -> Any:
    """A diagonal, the last dim, along `first` of the value that it lies in, the same in all columns."""
    return line[..., None].transpose(_order(line.ndim + 1, first, second))


def _order(ndim: int, first: int, second: int) -> list[int]:
    """The dims of [.., n, 1] in the order that puts n at `first` and 1 at `second`."""
    rest = iter(range(ndim - 2))
    return [ndim - 2 if d == first else ndim - 1 if d == second else next(rest) for d in range(ndim)]


def diagonal_matrix(ctx: OpContext) -> ValueIds:
    """[.., n] -> [.., n, .., n] with zeros beside the diagonal: row and column leave with the entry."""
    last = len(ctx.shape(ctx["self"])) - 1
    first, second = _dims(ctx, len(ctx.out))
    axes = ctx.freeze(_plain(ctx, "self"), [last], _REASON) if ctx["offset"] else _plain(ctx, "self")
    places = _order(len(ctx.out), first, second)
    result: ValueIds = {}
    for dim, ids in axes.items():
        if dim == last:
            result[first], result[second] = _spread(ids, first, second), _spread(ids, second, first)
        else:
            result[places.index(dim)] = _spread(ids, first, second)
    return result


def triangle(ctx: OpContext) -> ValueIds:
    """Zeros on one side of the main diagonal."""
    x, ndim = ctx["self"], len(ctx.out)
    return square(ctx, _plain(ctx, "self"), ctx.shape(x), ndim - 2, ndim - 1)


def trace(ctx: OpContext) -> ValueIds:
    """The sum of the diagonal."""
    axes = square(ctx, _plain(ctx, "self"), ctx.shape(ctx["self"]), 0, 1)
    for ids in axes.values():
        ctx.constraints.reduced(ids)
    return {}


def identity(ctx: OpContext) -> ValueIds:
    """Ones on the diagonal: what stays of it is smaller and the same, if rows and columns lose the same ones."""
    if ctx.out[0] != ctx.out[1] or ctx.out[0] == 1:
        return {}
    ids = unowned_ids(ctx, ctx.out, [0])[0]
    return {0: ids, 1: ids.swapaxes(0, 1)}


# -- what is computed when entries are gone -----------------------------------------------------------------


def _rows_and_columns(call: MaskedOp, mask: masks.Mask, ndim: int) -> list[Tensor]:
    """The presence of a diagonal's entries as that of the rows and the columns."""
    first, second = call["dim1"] % ndim, call["dim2"] % ndim
    pairs = ((first, second), (second, first))
    return [f[..., None].permute(_order(ndim, *pair)) for f in mask for pair in pairs]


def matrix_absent(call: MaskedOp) -> Any:
    """An entry of the matrix is present if its row and its column are."""
    result = call.run(call.data)
    return result, masks.tidy(_rows_and_columns(call, call.mask(call["self"]), result.dim()))


def scatter_absent(call: MaskedOp) -> Any:
    """What lies beside the diagonal goes with its row or column, also where it is a constant."""
    result, base = call.run(call.data), call["self"]
    own = list(call.mask(base))
    for factor in _rows_and_columns(call, call.mask(call["src"]), result.dim()):
        if repeats(call.data(base), factor):
            own.append(factor)
    whole = masks.full(tuple(own), result.shape)
    present = call.run(lambda item: whole if item is base else call.present(item))
    return result, masks.tidy([*own, present])


def triangle_absent(call: MaskedOp) -> Any:
    return call.run(call.data), call.mask(call["self"])


def trace_absent(call: MaskedOp) -> Any:
    return call.run(call.zeroed), ()


op("diagonal diagonal_copy", Family.MOVEMENT, ids=diagonal)
op("diagonal_scatter", Family.MOVEMENT, ids=diagonal_scatter, absent=scatter_absent)
op("diag_embed", Family.MOVEMENT, ids=diagonal_matrix, absent=matrix_absent)
op("tril triu", Family.MOVEMENT, ids=triangle, absent=triangle_absent)
op("trace", Family.REDUCTION, ids=trace, absent=trace_absent, mixes=lambda c: {"self": [0, 1]})
op("eye", Family.FACTORY, ids=identity)
