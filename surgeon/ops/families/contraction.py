"""Contractions: products summed over a shared dim, declared by letters (see `letters`).

The ids of one letter are joined over all operands that have it. A letter that is missing from the result is summed
over: its ids end there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import ProofError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import spec
from surgeon.ops import masks
from surgeon.ops.context import OpContext, broadcast, meet, opaque
from surgeon.ops.families.convolution import mixed_places, whole_windows
from surgeon.ops.families.moves.reshape import reshape
from surgeon.ops.ids import ValueIds
from surgeon.ops.letters import Operand, Step
from surgeon.ops.masked_op import MaskedOp, refusal, unchanged
from surgeon.ops.masks import Mask
from surgeon.ops.product import Product
from surgeon.ops.table import Family, Trait, bound, defaults, info, op

Shape = tuple[int, ...]
Lettered = tuple[ValueIds, Shape, Sequence[str]]  # ids and shape of an operand with one letter a dim


def contraction(ctx: OpContext) -> Any:
    """The rule of every op with letters."""
    products = bound(ctx.node)
    if products is None:  # operands of other dims than declared
        return opaque(ctx)
    result: tuple[ValueIds, Shape] = {}, ()
    for step in products.steps:
        operands = [
            _split(ctx, products, o, result if not o.name else _given(ctx, products, o))
            for o in step.operands
        ]
        letters, apart, shape = _dims_of_result(ctx, products, step)
        axes = contract(ctx, operands, letters, _rows(step))
        result = (reshape(ctx.constraints, axes, apart, shape) if apart != shape else axes), shape
        for operand in step.added:
            result = (
                broadcast(ctx, [result, _placed(operand, step.out, *_given(ctx, products, operand))], shape),
                shape,
            )
    several = ctx.node.meta["spec"]
    if isinstance(several, tuple):
        return tuple(result[0] if i == 0 else {} for i, _ in enumerate(several))
    return result[0]


def _given(ctx: OpContext, products: Product, operand: Operand) -> tuple[ValueIds, Shape]:
    axes, shape = ctx.axes(ctx[operand.name]), ctx.shape(ctx[operand.name])
    return (whole_windows(ctx, operand, axes) if products.windows else axes), shape


def _dims_of_result(ctx: OpContext, products: Product, step: Step) -> tuple[list[str], Shape, Shape]:
    """Letters of a result, its shape with a dim for each of them, and its shape."""
    shape = ctx.out if step is products.steps[-1] else products.shape(step.out)
    letters, apart = _apart(products, step.out, shape)
    return letters, apart, shape


def _apart(products: Product, operand: Operand, shape: Shape) -> tuple[list[str], Shape]:
    """One letter a dim: merged dims cut into theirs, windows by the places that they start at."""
    letters, apart = list[str](), list[int]()
    for dim, size in zip(operand.dims, shape, strict=True):
        own = dim.letters[:1] if dim.window else dim.letters
        letters += own
        sizes = [products.sizes[letter] for letter in own]
        apart += sizes if len(own) > 1 and size > 1 else [size] + [1] * (len(own) - 1)
    return letters, tuple(apart)


def _split(ctx: OpContext, products: Product, operand: Operand, given: tuple[ValueIds, Shape]) -> Lettered:
    """An operand with its merged dims cut into their letters.

    Example: 6 channels of a convolution with two groups, `(gc)`, become rows g and columns c of 3.
    """
    axes, shape = given
    letters, apart = _apart(products, operand, shape)
    return (reshape(ctx.constraints, axes, shape, apart) if len(apart) > len(shape) else axes), apart, letters


def _placed(operand: Operand, out: Operand, axes: ValueIds, shape: Shape) -> tuple[ValueIds, Shape]:
    """What is added, with a dim for each of the result's: a bias [C] as [1, C, 1, 1]."""
    if not operand.dims:
        return axes, shape
    wide = wide_shape(operand, out, shape)
    place = [i for i, dim in enumerate(out.dims) if dim in operand.dims]
    return {place[d]: dim_ids.reshape(wide) for d, dim_ids in axes.items()}, wide


def wide_shape(operand: Operand, out: Operand, shape: Sequence[int]) -> Shape:
    sizes = dict(zip(operand.dims, shape, strict=True))
    return tuple(sizes.get(dim, 1) for dim in out.dims)


def _rows(step: Step) -> frozenset[str]:
    """Letters that share a dim of the result with those of single products: heads of queries that share a head of keys and
    values.
    """
    dims = (dim.letters for dim in step.out.dims if not step.batch.isdisjoint(dim.letters))
    return frozenset(letter for dim in dims for letter in dim) - step.batch


def contract(
    ctx: OpContext, operands: list[Lettered], out: Sequence[str], rows: frozenset[str] = frozenset()
) -> ValueIds:
    """Join per letter and return the ids of the output's letters.

    Args:
        rows: letters of the output that number products like those that several operands have.

    Example: of "ik, kj -> ij" the ids of k in both operands are joined, and end; those of i and j pass.
    """
    constraints = ctx.constraints
    scores = Trait.SCORES in info(ctx.node).traits
    letters = sorted({letter for _, _, names in operands for letter in names})
    place = {letter: i for i, letter in enumerate(letters)}
    joined: dict[str, np.ndarray] = {}
    for letter in letters:
        operand_ids, fixed = [], False
        for axes, shape, names in operands:
            if letter not in names:
                continue
            dim = names.index(letter)
            if dim in axes:
                operand_ids.append(_spread(axes[dim], names, place))
            elif shape[dim] != 1:
                fixed = True
        if operand_ids and fixed:
            for dim_ids in operand_ids:
                constraints.freeze(dim_ids, "is multiplied with a tensor whose size here is fixed")
        elif operand_ids:
            joined[letter] = meet(constraints, operand_ids)
            if letter in out:
                constraints.carried(joined[letter])
            if letter in out and len(operand_ids) > 1:
                constraints.batched.append(joined[letter].ravel())
                if scores:
                    constraints.heads.append(joined[letter].ravel())
            elif scores and (letter not in out or letter not in operands[0][2]):
                constraints.head_dims.append(joined[letter].ravel())
            elif scores and letter in rows:
                constraints.heads.append(joined[letter].ravel())
    return _of_output(ctx, joined, letters, out)


def _of_output(
    ctx: OpContext, joined: dict[str, np.ndarray], letters: list[str], out: Sequence[str]
) -> ValueIds:
    """Ids over all letters as ids over those of the output; along the others they become constant."""
    place = {letter: i for i, letter in enumerate(letters)}
    result: ValueIds = {}
    for letter, dim_ids in joined.items():
        if letter not in out:
            continue
        for ended in set(letters) - set(out):
            dim_ids = ctx.constraints.collapse(dim_ids, place[ended])
        kept = [place[name] for name in sorted(out)]
        flat = dim_ids.reshape([dim_ids.shape[i] for i in kept])
        order = [sorted(out).index(name) for name in out]
        result[out.index(letter)] = flat.transpose(order)
    return result


def _spread(dim_ids: np.ndarray, names: Sequence[str], place: dict[str, int]) -> np.ndarray:
    """Ids over an operand's dims as ids over all letters."""
    order = sorted(range(len(names)), key=lambda i: place[names[i]])
    shape = [1] * len(place)
    for dim, name in enumerate(names):
        shape[place[name]] = dim_ids.shape[dim]
    return dim_ids.transpose(order).reshape(shape)


# -- what is computed when entries are gone -----------------------------------------------------------------


def product_absent(call: MaskedOp) -> Any:
    """Absent entries count as zero. An entry of the result is present if some of each operand's that it is made of are."""
    result, products = call.run(call.zeroed), bound(call.node)
    if products is None:
        return unchanged(call)
    (step,) = products.steps
    factors: list[Tensor] = []
    for operand in step.operands:
        mask = call.mask(call[operand.name])
        if products.windows and masks.varies(
            mask, mixed_places(call.arguments, operand, call.data(call["weight"]).shape)
        ):
            raise refusal(call, "presence varies over spatial dims")
        factors += _passed(mask, operand, step.out, products)
    for operand in step.added:
        mask = call.mask(call[operand.name])
        wide = [f.reshape(wide_shape(operand, step.out, f.shape)) for f in mask] if operand.dims else mask
        factors += masks.aligned(tuple(wide), result.dim())
    return result, masks.tidy(factors)


def _passed(mask: Mask, operand: Operand, out: Operand, products: Product) -> Mask:
    """Which entries of the result an operand has something for.

    Example: of a weight "(go)cK" in a convolution, the filters (go) of which any entry c, K is present.
    """
    apart = tuple(factor.reshape(_apart(products, operand, factor.shape)[1]) for factor in mask)
    letters, _ = _apart(products, operand, (1,) * len(operand.dims))
    kept, _ = _apart(products, out, (1,) * len(out.dims))
    found = masks.any_along(apart, [i for i, letter in enumerate(letters) if letter not in kept])
    own = [letter for letter in kept if letter in letters]
    passed = []
    for factor in found:
        rest = [i for i, letter in enumerate(letters) if letter not in kept]
        sizes = dict(zip(letters, factor.shape, strict=True))
        factor = factor.permute([*map(letters.index, own), *rest]).reshape(
            [sizes.get(letter, 1) for letter in kept]
        )
        passed.append(_merged(factor, out, products))
    return masks.tidy(passed)


def _merged(factor: Tensor, out: Operand, products: Product) -> Tensor:
    """A factor with a dim for each letter of the result, as one with its dims."""
    full, merged, at = list[int](), list[int](), 0
    for dim in out.dims:
        count = 1 if dim.window else len(dim.letters)
        sizes = list(factor.shape[at : at + count])
        if count > 1 and max(sizes) > 1:
            sizes = [products.sizes[letter] for letter in dim.letters]
        full += sizes
        merged.append(math.prod(sizes))
        at += count
    return factor.expand(full).reshape(merged)


def _trilinear_letters(given: Arguments) -> str:
    """Three operands, each with dims of size 1 put in at `expand`, multiplied and summed over `sumdim`: nn.Bilinear."""
    dims = len(spec(given["i1"]).shape) + len(given["expand1"])
    letters = "abcdefghijklm"[:dims]

    def without(gone: Sequence[int]) -> str:
        return "".join(letter for dim, letter in enumerate(letters) if dim not in gone)

    operands = ", ".join(f"i{number}:{without(given[f'expand{number}'])}" for number in (1, 2, 3))
    return f"{operands} -> {without(given['sumdim'])}"


def grouped_product(ctx: OpContext) -> Any:
    """x [T, K] in consecutive blocks of rows (up to each of `offs`), each times its own matrix of weight [E, K, N]."""
    if bound(ctx.node) is not None:
        for name, dim in (("self", 0), ("mat2", 0), ("offs", 0)):
            ctx.freeze(ctx.axes(ctx[name]), [dim], "is picked by expert")
    return contraction(ctx)


def grouped_in_float64(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Rows of x [T, K] up to each offset times its own matrix of weight [E, K, N]."""
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        raise ProofError(
            "cannot compute _grouped_mm in float64", why=f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    ends = offs.tolist()
    blocks = [x[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*blocks, x.new_zeros(x.shape[0] - ends[-1], weight.shape[2])])


defaults(Family.CONTRACTION, ids=contraction, absent=product_absent)

op("mm", Family.CONTRACTION, "self:nk, mat2:kj -> nj")
op("addmm _sparse_addmm", Family.CONTRACTION, "self:+, mat1:nk, mat2:kj -> nj")
op("bmm", Family.CONTRACTION, "self:(nh)ik, mat2:(nh)kj -> (nh)ij", traits={Trait.SCORES})
op("baddbmm", Family.CONTRACTION, "self:+, batch1:(nh)ik, batch2:(nh)kj -> (nh)ij", traits={Trait.SCORES})
op("addbmm", Family.CONTRACTION, "self:+, batch1:bik, batch2:bkj -> ij")
op("mv", Family.CONTRACTION, "self:nk, vec:k -> n")
op("addmv", Family.CONTRACTION, "self:+, mat:nk, vec:k -> n")
op("dot", Family.CONTRACTION, "self:k, tensor:k ->")
op("vdot", Family.CONTRACTION, "self:k, other:k ->")
op("outer", Family.CONTRACTION, "self:i, vec2:j -> ij")
op("linear", Family.CONTRACTION, "input:Rk, weight:jk, bias:+ -> Rj")
op("_trilinear", Family.CONTRACTION, _trilinear_letters)
op(
    "_grouped_mm", Family.CONTRACTION, "self:tk, mat2:ekj -> tj",
    ids=grouped_product, row_bytes=16, in_float64=grouped_in_float64,
)  # fmt: skip
