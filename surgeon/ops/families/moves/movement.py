"""Movement: the output holds entries of the inputs in other places, so the same op runs on the ids.

Ids are compressed (size 1 along dims where they are constant), so each rule runs its op on the dims that they vary
along and only renumbers the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.graph.arguments import Arguments
from surgeon.ops import masks
from surgeon.ops.context import OpContext, beside, opaque, shift
from surgeon.ops.families.factory import unowned_ids
from surgeon.ops.families.moves.reshape import permuted
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.side_by_side import presences
from surgeon.ops.table import Family, Trait, defaults, op


def getitem(ctx: OpContext) -> Any:
    source, index = ctx["arg0"], ctx["arg1"]
    axes: Any = ctx.axes(source)
    part: ValueIds = axes[index] if isinstance(axes, tuple) else {}
    return part


def permutation(given: Arguments, ndim: int) -> list[int]:
    """The dims of what is permuted, in the order of the result: of `permute`, `transpose`, `t` and kin."""
    if "dims" in given:
        return [int(d) % ndim for d in given["dims"]]
    order = list(range(ndim))
    if ndim >= 2:
        a, b = (
            given[name] % ndim if name in given else d for name, d in (("dim0", ndim - 2), ("dim1", ndim - 1))
        )
        order[a], order[b] = b, a
    return order


def permute(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    return permuted(ctx.axes(x), permutation(ctx.arguments, len(ctx.shape(x))))


def expand(ctx: OpContext) -> ValueIds:
    """A dim of size 1 that is repeated follows whatever it meets: its copies are alike. As often as a batch
    is long: it stays.
    """
    x = ctx["self"]
    ndim = len(ctx.out)
    axes = shift(ctx.axes(x), len(ctx.shape(x)), ndim)
    old = (1,) * (ndim - len(ctx.shape(x))) + ctx.shape(x)
    return {**axes, **_copies(ctx, old)}


def as_strided(ctx: OpContext) -> ValueIds:
    """Windows on memory that may overlap: dims that one of the output's steps through from end to end, and no
    other one, pass.
    """
    if "layout" not in ctx.node.meta:  # in place: what it was written to lies there no longer as it did
        return dict(opaque(ctx))
    x, sizes, strides = ctx["self"], ctx["size"], ctx["stride"]
    shape = ctx.shape(x)
    place = dict[int, int]()
    layout, offset = ctx.node.meta["layout"]
    steps = dense(shape, layout)
    for dim, (size, step) in enumerate(zip(shape, steps, strict=True)):
        own = [i for i, (n, t) in enumerate(zip(sizes, strides, strict=True)) if (n, t) == (size, step)]
        rest = [(n, t) for i, (n, t) in enumerate(zip(sizes, strides, strict=True)) if n > 1 and i not in own]
        inside = sum((n - 1) * t for n, t in rest if t < step)
        if len(own) == 1 and inside < step and all(t < step or t % (size * step) == 0 for _, t in rest):
            place[dim] = own[0]
    gaps = any(n > 1 and step != found for n, step, found in zip(shape, steps, layout, strict=True))
    if gaps or ctx["storage_offset"] not in (None, offset):
        place = {}
    axes = ctx.freeze(ctx.axes(x), set(range(len(shape))) - set(place), "is read in windows of memory")
    result: ValueIds = {}
    for dim, dim_ids in axes.items():
        for other in set(range(len(shape))) - set(place):
            dim_ids = ctx.constraints.collapse(dim_ids, other)
        order = sorted(place, key=place.__getitem__)
        moved = dim_ids.transpose([*order, *(d for d in range(len(shape)) if d not in place)])
        wide = [1] * len(sizes)
        for d in order:
            wide[place[d]] = dim_ids.shape[d]
        result[place[dim]] = moved.reshape(wide)
    return result


def dense(shape: Sequence[int], layout: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dims lie in memory in the order of the strides `layout`."""
    steps, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (layout[d], -d)):
        steps[dim] = step
        step *= shape[dim]
    return tuple(steps)


def cat(ctx: OpContext) -> ValueIds:
    parts = list(ctx["tensors"])
    parts = [p for p in parts if ctx.shape(p) != (0,)]
    ndim = len(ctx.out)
    dim = int(ctx["dim"]) % ndim
    result: ValueIds = {}
    for d in range(ndim):
        operand_ids = [ctx.axes(p).get(d) for p in parts]
        if all(t is None for t in operand_ids):
            continue
        if d != dim:
            kept = [t for t in operand_ids if t is not None]
            if len(kept) < len(parts):
                for loose in kept:
                    ctx.constraints.freeze(loose, "is concatenated with a tensor whose size here is fixed")
            else:
                result[d] = _cat_rows(ctx, kept, parts, d, dim)
            continue
        filled = []
        for part, found in zip(parts, operand_ids, strict=True):
            size, dim_ids = ctx.shape(part)[dim], found
            if dim_ids is None:  # entries that may not be removed
                dim_ids = ctx.constraints.new(size).reshape([-1 if i == dim else 1 for i in range(ndim)])
                ctx.constraints.freeze(dim_ids, "is concatenated and its size is fixed")
            filled.append(dim_ids)
        rows = np.broadcast_shapes(
            *[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in filled]
        )
        full = [
            np.broadcast_to(t, [t.shape[i] if i == dim else rows[i] for i in range(ndim)]) for t in filled
        ]
        result[dim] = np.concatenate(full, axis=dim)
    return result


def _cat_rows(ctx: OpContext, operand_ids: list[DimIds], parts: list[fx.Node], own: int, dim: int) -> DimIds:
    """Ids of another dim than the concatenated one: joined, or laid side by side where they vary along
    it.
    """
    if all(t.shape[dim] == 1 for t in operand_ids):
        return beside(ctx.constraints, operand_ids)
    sizes = [ctx.shape(p)[dim] for p in parts]
    rows = np.broadcast_shapes(
        *[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in operand_ids]
    )
    full = [
        np.broadcast_to(t, [size if i == dim else rows[i] for i in range(t.ndim)])
        for t, size in zip(operand_ids, sizes, strict=True)
    ]
    joined = np.concatenate(full, axis=dim)
    ctx.constraints.balance(joined, own)  # the rows of one part keep as many entries as those of the others
    return joined


def stack(ctx: OpContext) -> ValueIds:
    parts = list(ctx["tensors"])
    dim = int(ctx["dim"]) % len(ctx.out)
    result: ValueIds = {}
    for d in {d for p in parts for d in ctx.axes(p)}:
        operand_ids = [ctx.axes(p).get(d) for p in parts]
        kept = [np.expand_dims(t, dim) for t in operand_ids if t is not None]
        if len(kept) < len(parts):
            for dim_ids in kept:
                ctx.constraints.freeze(dim_ids, "is stacked with a tensor whose size here is fixed")
            continue
        rows = np.broadcast_shapes(*[t.shape for t in kept])
        joined = np.concatenate([np.broadcast_to(t, rows) for t in kept], axis=dim)
        out = d + (d >= dim)
        if dim < out:  # the stacked tensors are rows: each may keep its own entries, equally many
            ctx.constraints.balance(joined, out)
            result[out] = joined
        else:
            result[out] = ctx.constraints.collapse(joined, dim)
    return result


def flip(ctx: OpContext) -> ValueIds:
    ndim = len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dims"]]
    return {d: np.flip(t, tuple(i for i in dims if t.shape[i] > 1)) for d, t in ctx.axes(ctx["self"]).items()}


def roll(ctx: OpContext) -> ValueIds:
    """Rolling along a dim without channels moves nothing that matters; along channels the shift is a number
    in the code.
    """
    ndim = len(ctx.out)
    dims = [int(d) % ndim for d in ctx["dims"]] or list(range(ndim))
    axes = ctx.freeze(ctx.axes(ctx["self"]), dims, "is rolled by a fixed number")
    return {
        d: np.roll(
            t,
            [s for s, i in zip(ctx["shifts"], dims, strict=False) if t.shape[i] > 1],
            [i for i in dims if t.shape[i] > 1],
        )
        for d, t in axes.items()
    }


def repeat(ctx: OpContext) -> ValueIds:
    x = ctx["self"]
    ndim = len(ctx.out)
    old = (1,) * (ndim - len(ctx.shape(x))) + ctx.shape(x)
    counts = [new // size if size else 1 for new, size in zip(ctx.out, old, strict=True)]
    axes = {}
    for d, t in shift(ctx.axes(x), len(ctx.shape(x)), ndim).items():
        axes[d] = np.tile(t, [n if t.shape[i] > 1 else 1 for i, n in enumerate(counts)])
    return {**axes, **_copies(ctx, old)}


def _copies(ctx: OpContext, old: tuple[int, ...]) -> ValueIds:
    """Ids of the dims that were of size 1, but for those whose new size the code read from a dim that is
    fixed.
    """
    sources = ctx.node.meta.get("repeated", {})
    fixed = {dim for dim, source in sources.items() if source.dim not in ctx.axes(source.node)}
    grown = [d for d, size in enumerate(ctx.out) if old[d] == 1 and size > 1 and d not in fixed]
    return unowned_ids(ctx, ctx.out, grown)


# -- what is computed when entries are gone: presence is moved as the entries are ------------------------------


def moved(call: MaskedOp, exact: bool = True) -> Any:
    """Presence moves like what is moved, the first operand.

    Args:
        exact: where presence repeats is found by comparing it, not by strides alone.
    """
    result, first = call.run(call.data), call["self"]
    shape, mask = call.data(first).shape, call.mask(first)
    if not isinstance(result, list | tuple):
        return result, masks.moved(mask, shape, lambda factor: call.on(first, factor), exact)
    parts = [[masks.compress(part, exact=True) for part in call.on(first, f.expand(shape))] for f in mask]
    return [(r, masks.tidy(part[i] for part in parts)) for i, r in enumerate(result)]


def viewed(call: MaskedOp) -> Any:
    """Of a view, what repeats has a stride of 0."""
    return moved(call, exact=False)


def joined(call: MaskedOp) -> Any:
    """Of tensors that are put side by side along the argument `dim`: presence as one tensor for each."""
    result = call.run(call.data)
    if not call.masked:
        return result, ()
    empty = {part for part in call.node.all_input_nodes if call.data(part).shape == (0,)}  # adds nothing
    parts = [part for part in call.node.all_input_nodes if part not in empty]
    own = presences(call, parts, call["dim"] % result.dim(), result.dim())

    def present(item: Any) -> Any:
        return call.present(item) if item not in own else masks.full(own[item], call.data(item).shape)

    return result, masks.tidy([masks.compress(call.run(present), exact=True)])


def strided(call: MaskedOp) -> Any:
    """What is read lies in memory as it did in the recorded run."""
    if "layout" not in call.node.meta:
        return moved(call)
    x, size, stride = call["self"], call["size"], call["stride"]
    strides, offset = call.node.meta["layout"]
    start = 0 if call["storage_offset"] is None else call["storage_offset"] - offset

    def op(tensor: Tensor) -> Tensor:
        laid = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
        return laid.as_strided(size, stride, start)

    return op(call.data(x)), masks.moved(call.mask(x), call.data(x).shape, op, exact=True)


defaults(Family.MOVEMENT, absent=moved)

op("getitem", Family.MOVEMENT, ids=getitem)
op(
    "permute t transpose numpy_T adjoint",
    Family.MOVEMENT,
    ids=permute,
    absent=viewed,
    traits={Trait.PERMUTES},
)
op("expand broadcast_to expand_copy", Family.MOVEMENT, ids=expand, absent=viewed, traits={Trait.REPEATS})
op("as_strided", Family.MOVEMENT, ids=as_strided, absent=strided, traits={Trait.INCIDENTAL})
op("cat concat", Family.MOVEMENT, ids=cat, absent=joined)
op("stack", Family.MOVEMENT, ids=stack, absent=joined)
op("flip", Family.MOVEMENT, ids=flip)
op("roll", Family.MOVEMENT, ids=roll)
op("repeat tile", Family.MOVEMENT, ids=repeat)
