"""Contractions: products summed over a shared dim. Written as letters, like einsum.

Each operand and the output name their dims by letters; the tracks of one letter are joined over all operands
that have it. A letter that is missing from the output is summed over: its ids end there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from surgeon.ops.elementwise import per_channel
from surgeon.ops.ids import ValueIds
from surgeon.ops.reshape import reshape
from surgeon.ops.table import FUSED_ATTENTION, Family, Site, broadcast, meet, op_name, opaque, rule

Operand = tuple[ValueIds, tuple[int, ...], str]


_ATTENDS = ("bmm", "baddbmm", *FUSED_ATTENTION)


def contract(site: Site, operands: list[Operand], out: str) -> ValueIds:
    """Join per letter and return the tracks of the output's letters."""
    constraints = site.constraints
    attends = op_name(site.node) in _ATTENDS
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


def _operand(site: Site, arg: Any, names: str) -> Operand:
    return site.axes(arg), site.shape(arg), names


def _plain(site: Site, left: Any, right: Any, spec: str) -> ValueIds:
    ins, out = spec.split("->")
    a, b = ins.split(",")
    return contract(site, [_operand(site, left, a), _operand(site, right, b)], out)


_SPECS = {
    "mm": "ik,kj->ij",
    "bmm": "bik,bkj->bij",
    "mv": "ik,k->i",
    "dot": "k,k->",
    "vdot": "k,k->",
    "outer": "i,j->ij",
}


@rule(Family.CONTRACTION, *_SPECS)
def product(site: Site) -> ValueIds:
    name = op_name(site.node)
    return _plain(site, site.args[0], site.args[1], _SPECS[name])


@rule(Family.CONTRACTION, "_trilinear")
def trilinear(site: Site) -> ValueIds:
    """Three operands, each with dims of size 1 put in, multiplied and summed over `sumdim`: nn.Bilinear."""
    operands: list[Operand] = []
    for node, expand in zip(site.args[:3], site.args[3:6], strict=True):
        letters = [
            letter
            for d, letter in enumerate(_LETTERS[: len(site.shape(node)) + len(expand)])
            if d not in expand
        ]
        operands.append(_operand(site, node, "".join(letters)))
    summed = set(site.arg(6))
    letters_of_all = _LETTERS[
        : max(len(site.shape(node)) + len(e) for node, e in zip(site.args[:3], site.args[3:6], strict=True))
    ]
    return contract(
        site, operands, "".join(letter for d, letter in enumerate(letters_of_all) if d not in summed)
    )


_LETTERS = "abcdefgh"


@rule(Family.REDUCTION, "_cdist_forward", "_euclidean_dist")
def distances(site: Site) -> ValueIds:
    """Distances of all rows of one matrix [..., i, k] from those of another [..., j, k]; leading dims are
    broadcast.
    """
    left, right = site.args[:2]
    batch = _LETTERS[: len(site.out) - 2]
    operands = [
        _operand(site, node, batch[len(batch) - len(site.shape(node)) + 2 :] + row + "k")
        for node, row in ((left, "i"), (right, "j"))
    ]
    return contract(site, operands, batch + "ij")


@rule(Family.CONTRACTION, "_grouped_mm")
def grouped_product(site: Site) -> ValueIds:
    """x [T, K] in consecutive blocks of rows (up to each of `offs`), each times its own matrix of weight [E,
    K, N].
    """
    x, weight, offs = site.arg(0), site.arg(1), site.arg(2, "offs")
    if len(site.shape(x)) != 2 or len(site.shape(weight)) != 3:
        return {**opaque(site)}
    for node, dim in ((x, 0), (weight, 0), (offs, 0)):
        site.freeze(site.axes(node), [dim], "is picked by expert")
    operands: list[Operand] = []
    for node, letters in ((x, "tk"), (weight, "ekn")):
        operands.append(({d: t for d, t in site.axes(node).items() if d}, site.shape(node), letters))
    return contract(site, operands, "tn")


@rule(Family.CONTRACTION, "addmm", "baddbmm", "addbmm", "addmv")
def product_plus(site: Site) -> ValueIds:
    name = op_name(site.node)
    spec = {"addmm": "ik,kj->ij", "baddbmm": "bik,bkj->bij", "addbmm": "bik,bkj->ij", "addmv": "ik,k->i"}[
        name
    ]
    bias, left, right = site.args[:3]
    out = _plain(site, left, right, spec)
    return broadcast(site, [(out, site.out), (site.axes(bias), site.shape(bias))], site.out)


@rule(Family.CONTRACTION, "linear")
def linear(site: Site) -> ValueIds:
    x, weight, bias = site.arg(0), site.arg(1), site.arg(2, "bias")
    rows = "abcdefgh"[: len(site.out) - 1]
    out = contract(site, [_operand(site, x, rows + "k"), _operand(site, weight, "zk")], rows + "z")
    if bias is None:
        return out
    return broadcast(site, [(out, site.out), (site.axes(bias), site.shape(bias))], site.out)


@rule(Family.CONTRACTION, "convolution", "_convolution")
def convolution(site: Site) -> ValueIds:
    """Input [N, C, ...], weight [O, C/g, ...] (transposed: [C, O/g, ...]). Groups cut C and O into a grid
    with equal rows.
    """
    x, weight, bias = site.args[:3]
    transposed, groups = bool(site.arg(6)), int(site.arg(8))
    shape, ndim = site.shape(x), len(site.shape(x))
    w_shape = site.shape(weight)
    fixed = [d for d in range(2, ndim) if not passes(site.args, w_shape, d)]
    x_axes = site.freeze(site.axes(x), fixed, "is a spatial dim of a convolution")
    w_axes = site.freeze(site.axes(weight), range(2, ndim), "is a kernel dim of a convolution")
    spatial = "pqr"[: ndim - 2]
    channels, filters = shape[1], site.out[1]
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
    w_axes = reshape(site.constraints, w_axes, w_shape[:2], w_split)
    x_axes = reshape(site.constraints, x_axes, shape, in_shape)
    x_axes = {d: _flatten_dims(site, t, fixed, 1) for d, t in x_axes.items()}
    out = contract(
        site,
        [(x_axes, (*in_shape[:3], *places), "ngc" + spatial), (w_axes, w_split, w_names)],
        "ngo" + spatial,
    )
    merged = reshape(site.constraints, out, out_shape, (shape[0], filters, *places))
    if bias is None:
        return merged
    vector = per_channel(site.shape(bias), site.axes(bias), ndim)[1]
    wide = (1, filters, *(1,) * (ndim - 2))
    return broadcast(
        site, [(merged, (shape[0], filters, *places)), (vector, wide)], (shape[0], filters, *places)
    )


def passes(args: Any, weight: Any, dim: int) -> bool:
    """Whether a convolution works on each place of a spatial dim by itself: a kernel of one, no stride and no
    padding.
    """
    stride, padding = args[3], args[4]
    return bool(
        weight[dim] == 1 and stride[(dim - 2) % len(stride)] == 1 and padding[(dim - 2) % len(padding)] == 0
    )


def _flatten_dims(site: Site, track: np.ndarray, dims: list[int], offset: int) -> np.ndarray:
    for dim in dims:
        track = site.constraints.collapse(track, dim + offset)
    return track


@rule(Family.CONTRACTION, *FUSED_ATTENTION)
def attention(site: Site) -> Any:
    """softmax(q k^T / sqrt(d) + mask) v with q [B, H, N, D], k [B, K, M, D], v [B, K, M, E]; heads and dims
    are tied.

    K divides H: each head of k and v serves H/K heads of q in a row (grouped queries).
    """
    q, k, v = site.args[:3]
    name = op_name(site.node)
    mask = site.node.kwargs.get("attn_mask")
    if mask is None and "efficient" in name:
        mask = site.arg(3)
    batch, heads, queries, width = site.shape(q)
    served = site.shape(k)[1]
    cut, shape = (batch, served, heads // served), (batch, heads, queries, site.shape(k)[2])
    wide = reshape(site.constraints, site.axes(q), site.shape(q), (*cut, queries, width))
    scores = contract(site, [(wide, (*cut, queries, width), "bhgnd"), _operand(site, k, "bhmd")], "bhgnm")
    scores = reshape(site.constraints, scores, (*cut, *shape[2:]), shape)
    if mask is not None:
        scores = broadcast(site, [(scores, shape), (site.axes(mask), site.shape(mask))], shape)
    q_axes, v_axes = site.axes(q), site.axes(v)
    wide = reshape(site.constraints, scores, shape, (*cut, *shape[2:]))
    out = contract(site, [(wide, (*cut, *shape[2:]), "bhgnm"), _operand(site, v, "bhmd")], "bhgnd")
    out = reshape(
        site.constraints, out, (*cut, queries, site.shape(v)[3]), (batch, heads, queries, site.shape(v)[3])
    )
    if site.shape(q)[3] == site.shape(v)[3]:  # the fused kernels take one head dim
        if 3 in q_axes and 3 in v_axes:
            rows = [axes[3].reshape(-1, axes[3].shape[-1]) for axes in (q_axes, v_axes)]
            site.constraints.balance(np.concatenate(rows), 1)
        else:
            for axes in (q_axes, v_axes):
                site.freeze(axes, [3], "shares its head size with queries or values whose size here is fixed")
    return tuple(out if i == 0 else {} for i, _ in enumerate(site.node.meta["spec"]))


@rule(Family.CONTRACTION, "embedding")
def embedding(site: Site) -> ValueIds:
    """weight [V, D] looked up by ids [...]: rows are data and stay; D passes."""
    weight, index = site.args[:2]
    axes = site.freeze(site.axes(weight), [0], "is looked up by index")
    site.constraints.freeze_all(site.axes(index), "is used as an index")
    ndim = len(site.out)
    return {ndim - 1: axes[1].reshape((1,) * (ndim - 1) + (-1,))} if 1 in axes else {}


@rule(Family.CONTRACTION, "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(site: Site) -> tuple[ValueIds, ...]:
    """As `embedding`, the rows of each bag put together; which were the greatest is of the same shape."""
    axes = site.freeze(site.axes(site.args[0]), [0], "is looked up by index")
    for other in site.tensors:
        if other is not site.args[0]:
            site.constraints.freeze_all(site.axes(other), "is used as an index, or one for each row")
    out = {1: axes[1]} if 1 in axes else {}
    return tuple(
        out if spec is not None and spec.shape == site.out else {} for spec in site.node.meta["spec"]
    )
