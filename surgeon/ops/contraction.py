"""Contractions: products summed over a shared dim. Written as letters, like einsum.

Each operand and the output name their dims by letters; the tracks of one letter are joined over all operands
that have it. A letter that is missing from the output is summed over: its ids end there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgeon.graph.arguments import Arguments
from surgeon.ops.elementwise import per_channel
from surgeon.ops.ids import ValueIds
from surgeon.ops.reshape import reshape
from surgeon.ops.table import FUSED_ATTENTION, Family, OpContext, broadcast, meet, op_name, opaque, rule

Operand = tuple[ValueIds, tuple[int, ...], str]


_ATTENDS = ("bmm", "baddbmm", *FUSED_ATTENTION)


def contract(ctx: OpContext, operands: list[Operand], out: str) -> ValueIds:
    """Join per letter and return the tracks of the output's letters."""
    constraints = ctx.constraints
    attends = op_name(ctx.node) in _ATTENDS
    letters = sorted({letter for _, _, names in operands for letter in names})
    place = {letter: i for i, letter in enumerate(letters)}
    joined: dict[str, np.ndarray] = {}
    for letter in letters:
        tracks, fixed = [], False
        for axes, shape, names in operands:
            if letter not in names:
                continue
            dim = names.index(letter)
            if dim in axes:
                tracks.append(_spread(axes[dim], names, place))
            elif shape[dim] != 1:
                fixed = True
        if tracks and fixed:
            for track in tracks:
                constraints.freeze(track, "is multiplied with a tensor whose size here is fixed")
        elif tracks:
            joined[letter] = meet(constraints, tracks)
            if letter in out and len(tracks) > 1:
                constraints.batched.append(joined[letter].ravel())
                if attends:
                    constraints.heads.append(joined[letter].ravel())
            elif attends and (letter not in out or letter not in operands[0][2]):
                constraints.head_dims.append(joined[letter].ravel())
            elif attends and letter == "g":  # heads of queries that share a head of keys and values
                constraints.heads.append(joined[letter].ravel())
    result: ValueIds = {}
    for letter, track in joined.items():
        if letter not in out:
            continue
        for ended in set(letters) - set(out):
            track = constraints.collapse(track, place[ended])
        kept = [place[name] for name in sorted(out)]
        flat = track.reshape([track.shape[i] for i in kept])
        order = [sorted(out).index(name) for name in out]
        result[out.index(letter)] = flat.transpose(order)
    return result


def _spread(track: np.ndarray, names: str, place: dict[str, int]) -> np.ndarray:
    """A track over an operand's dims as a track over all letters."""
    order = sorted(range(len(names)), key=lambda i: place[names[i]])
    shape = [1] * len(place)
    for dim, name in enumerate(names):
        shape[place[name]] = track.shape[dim]
    return track.transpose(order).reshape(shape)


def _operand(ctx: OpContext, arg: Any, names: str) -> Operand:
    return ctx.axes(arg), ctx.shape(arg), names


def _plain(ctx: OpContext, left: Any, right: Any, spec: str) -> ValueIds:
    ins, out = spec.split("->")
    a, b = ins.split(",")
    return contract(ctx, [_operand(ctx, left, a), _operand(ctx, right, b)], out)


_SPECS = {
    "mm": "ik,kj->ij",
    "bmm": "bik,bkj->bij",
    "mv": "ik,k->i",
    "dot": "k,k->",
    "vdot": "k,k->",
    "outer": "i,j->ij",
}


@rule(Family.CONTRACTION, *_SPECS)
def product(ctx: OpContext) -> ValueIds:
    name = op_name(ctx.node)
    return _plain(ctx, ctx["self"], ctx["mat2|vec|tensor|other|vec2"], _SPECS[name])


@rule(Family.CONTRACTION, "_trilinear")
def trilinear(ctx: OpContext) -> ValueIds:
    """Three operands, each with dims of size 1 put in, multiplied and summed over `sumdim`: nn.Bilinear."""
    operands: list[Operand] = []
    factors = [ctx[name] for name in ("i1", "i2", "i3")]
    expands = [ctx[name] for name in ("expand1", "expand2", "expand3")]
    for node, expand in zip(factors, expands, strict=True):
        letters = [
            letter
            for d, letter in enumerate(_LETTERS[: len(ctx.shape(node)) + len(expand)])
            if d not in expand
        ]
        operands.append(_operand(ctx, node, "".join(letters)))
    summed = set(ctx["sumdim"])
    letters_of_all = _LETTERS[
        : max(len(ctx.shape(node)) + len(e) for node, e in zip(factors, expands, strict=True))
    ]
    return contract(
        ctx, operands, "".join(letter for d, letter in enumerate(letters_of_all) if d not in summed)
    )


_LETTERS = "abcdefgh"


@rule(Family.REDUCTION, "_cdist_forward", "_euclidean_dist", mixes=lambda c: {"x1": [-1], "x2": [-1]})
def distances(ctx: OpContext) -> ValueIds:
    """Distances of all rows of one matrix [..., i, k] from those of another [..., j, k]; leading dims are
    broadcast.
    """
    left, right = ctx["x1"], ctx["x2"]
    batch = _LETTERS[: len(ctx.out) - 2]
    operands = [
        _operand(ctx, node, batch[len(batch) - len(ctx.shape(node)) + 2 :] + row + "k")
        for node, row in ((left, "i"), (right, "j"))
    ]
    return contract(ctx, operands, batch + "ij")


@rule(Family.CONTRACTION, "_grouped_mm")
def grouped_product(ctx: OpContext) -> ValueIds:
    """x [T, K] in consecutive blocks of rows (up to each of `offs`), each times its own matrix of weight [E,
    K, N].
    """
    x, weight, offs = ctx["self"], ctx["mat2"], ctx["offs"]
    if len(ctx.shape(x)) != 2 or len(ctx.shape(weight)) != 3:
        return {**opaque(ctx)}
    for node, dim in ((x, 0), (weight, 0), (offs, 0)):
        ctx.freeze(ctx.axes(node), [dim], "is picked by expert")
    operands: list[Operand] = []
    for node, letters in ((x, "tk"), (weight, "ekn")):
        operands.append(({d: t for d, t in ctx.axes(node).items() if d}, ctx.shape(node), letters))
    return contract(ctx, operands, "tn")


@rule(Family.CONTRACTION, "addmm", "baddbmm", "addbmm", "addmv")
def product_plus(ctx: OpContext) -> ValueIds:
    name = op_name(ctx.node)
    spec = {"addmm": "ik,kj->ij", "baddbmm": "bik,bkj->bij", "addbmm": "bik,bkj->ij", "addmv": "ik,k->i"}[
        name
    ]
    bias, left, right = (ctx[name] for name in ("self", "mat1|batch1|mat", "mat2|batch2|vec"))
    out = _plain(ctx, left, right, spec)
    return broadcast(ctx, [(out, ctx.out), (ctx.axes(bias), ctx.shape(bias))], ctx.out)


@rule(Family.CONTRACTION, "linear")
def linear(ctx: OpContext) -> ValueIds:
    x, weight, bias = ctx["input"], ctx["weight"], ctx["bias"]
    rows = "abcdefgh"[: len(ctx.out) - 1]
    out = contract(ctx, [_operand(ctx, x, rows + "k"), _operand(ctx, weight, "zk")], rows + "z")
    if bias is None:
        return out
    return broadcast(ctx, [(out, ctx.out), (ctx.axes(bias), ctx.shape(bias))], ctx.out)


def _windows(ctx: OpContext) -> dict[str, list[int]]:
    """The spatial dims of the input that the kernel looks through, and all dims of the kernel."""
    every = range(2, len(ctx.out))
    seen = [d for d in every if not passes(ctx.arguments, ctx.shape(ctx["weight"]), d)]
    return {"input": seen, "weight": list(every)}


@rule(Family.CONTRACTION, "convolution", "_convolution", mixes=_windows)
def convolution(ctx: OpContext) -> ValueIds:
    """Input [N, C, ...], weight [O, C/g, ...] (transposed: [C, O/g, ...]). Groups cut C and O into a grid
    with equal rows.
    """
    x, weight, bias = ctx["input"], ctx["weight"], ctx["bias"]
    transposed, groups = bool(ctx["transposed"]), int(ctx["groups"])
    shape, ndim = ctx.shape(x), len(ctx.shape(x))
    w_shape = ctx.shape(weight)
    fixed = [d for d in range(2, ndim) if not passes(ctx.arguments, w_shape, d)]
    x_axes = ctx.freeze(ctx.axes(x), fixed, "is a spatial dim of a convolution")
    w_axes = ctx.freeze(ctx.axes(weight), range(2, ndim), "is a kernel dim of a convolution")
    spatial = "pqr"[: ndim - 2]
    channels, filters = shape[1], ctx.out[1]
    places = tuple(1 if d in fixed else shape[d] for d in range(2, ndim))
    out_shape = (shape[0], groups, filters // groups, *places)
    in_shape = (shape[0], groups, channels // groups, *shape[2:])
    # the kernel's dims end here and vary with nothing
    w_axes = {d: t.reshape(t.shape[:2]) for d, t in w_axes.items()}
    if transposed:
        w_split = (groups, channels // groups, filters // groups)
        w_names = "gco"
    else:
        w_split = (groups, filters // groups, channels // groups)
        w_names = "goc"
    w_axes = reshape(ctx.constraints, w_axes, w_shape[:2], w_split)
    x_axes = reshape(ctx.constraints, x_axes, shape, in_shape)
    out = contract(
        ctx,
        [(x_axes, (*in_shape[:3], *places), "ngc" + spatial), (w_axes, w_split, w_names)],
        "ngo" + spatial,
    )
    merged = reshape(ctx.constraints, out, out_shape, (shape[0], filters, *places))
    if bias is None:
        return merged
    vector = per_channel(ctx.shape(bias), ctx.axes(bias), ndim)[1]
    wide = (1, filters, *(1,) * (ndim - 2))
    return broadcast(
        ctx, [(merged, (shape[0], filters, *places)), (vector, wide)], (shape[0], filters, *places)
    )


def passes(arguments: Arguments, weight: Any, dim: int) -> bool:
    """Whether a convolution works on each place of a spatial dim by itself: a kernel of one, no stride and no
    padding.
    """
    stride, padding = arguments["stride"], arguments["padding"]
    return bool(
        weight[dim] == 1 and stride[(dim - 2) % len(stride)] == 1 and padding[(dim - 2) % len(padding)] == 0
    )


@rule(Family.CONTRACTION, *FUSED_ATTENTION)
def attention(ctx: OpContext) -> Any:
    """softmax(q k^T / sqrt(d) + mask) v with q [B, H, N, D], k [B, K, M, D], v [B, K, M, E]; heads and dims
    are tied.

    K divides H: each head of k and v serves H/K heads of q in a row (grouped queries).
    """
    q, k, v, mask = ctx["query"], ctx["key"], ctx["value"], ctx.get("attn_bias|attn_mask")
    batch, heads, queries, width = ctx.shape(q)
    served = ctx.shape(k)[1]
    cut, shape = (batch, served, heads // served), (batch, heads, queries, ctx.shape(k)[2])
    wide = reshape(ctx.constraints, ctx.axes(q), ctx.shape(q), (*cut, queries, width))
    scores = contract(ctx, [(wide, (*cut, queries, width), "bhgnd"), _operand(ctx, k, "bhmd")], "bhgnm")
    scores = reshape(ctx.constraints, scores, (*cut, *shape[2:]), shape)
    if mask is not None:
        scores = broadcast(ctx, [(scores, shape), (ctx.axes(mask), ctx.shape(mask))], shape)
    q_axes, v_axes = ctx.axes(q), ctx.axes(v)
    wide = reshape(ctx.constraints, scores, shape, (*cut, *shape[2:]))
    out = contract(ctx, [(wide, (*cut, *shape[2:]), "bhgnm"), _operand(ctx, v, "bhmd")], "bhgnd")
    out = reshape(
        ctx.constraints, out, (*cut, queries, ctx.shape(v)[3]), (batch, heads, queries, ctx.shape(v)[3])
    )
    if ctx.shape(q)[3] == ctx.shape(v)[3]:  # the fused kernels take one head dim
        if 3 in q_axes and 3 in v_axes:
            rows = [axes[3].reshape(-1, axes[3].shape[-1]) for axes in (q_axes, v_axes)]
            ctx.constraints.balance(np.concatenate(rows), 1)
        else:
            for axes in (q_axes, v_axes):
                ctx.freeze(axes, [3], "shares its head size with queries or values whose size here is fixed")
    return tuple(out if i == 0 else {} for i, _ in enumerate(ctx.node.meta["spec"]))


@rule(Family.CONTRACTION, "embedding", mixes=lambda c: {"weight": [0]})
def embedding(ctx: OpContext) -> ValueIds:
    """weight [V, D] looked up by ids [...]: rows are data and stay; D passes."""
    weight, index = ctx["weight"], ctx["indices"]
    axes = ctx.freeze(ctx.axes(weight), [0], "is looked up by index")
    ctx.constraints.freeze_all(ctx.axes(index), "is used as an index")
    ndim = len(ctx.out)
    return {ndim - 1: axes[1].reshape((1,) * (ndim - 1) + (-1,))} if 1 in axes else {}


@rule(Family.CONTRACTION, "_embedding_bag", "_embedding_bag_forward_only", mixes=lambda c: {"weight": [0]})
def embedding_bag(ctx: OpContext) -> tuple[ValueIds, ...]:
    """As `embedding`, the rows of each bag put together; which were the greatest is of the same shape."""
    axes = ctx.freeze(ctx.axes(ctx["weight"]), [0], "is looked up by index")
    for other in ctx.tensors:
        if other is not ctx["weight"]:
            ctx.constraints.freeze_all(ctx.axes(other), "is used as an index, or one for each row")
    out = {1: axes[1]} if 1 in axes else {}
    return tuple(out if spec is not None and spec.shape == ctx.out else {} for spec in ctx.node.meta["spec"])
