"""Movement: the output holds entries of the inputs in other places, so the same op runs on the ids.

Tracks are compressed (size 1 along dims where they are constant), so each rule runs its op on the dims that a track varies
along and only renumbers the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from surgeon.labels import Axes, Track, reshape
from surgeon.rules.factory import free_axes
from surgeon.rules.registry import Family, Site, meet, rule, shift


@rule(Family.MOVEMENT, "getitem")
def getitem(site: Site) -> Any:
    source, index = site.node.args
    axes = site.axes(source)
    return axes[index] if isinstance(axes, tuple) else {}


@rule(Family.MOVEMENT, "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "unsafe_reshape", "view_copy")
def view(site: Site) -> Axes:
    x = site.node.args[0]
    return reshape(site.ledger, site.axes(x), site.shape(x), site.out)


def permuted(axes: Axes, order: list[int]) -> Axes:
    return {order.index(d): t.transpose(order) for d, t in axes.items()}


@rule(Family.MOVEMENT, "permute", "t", "transpose", "numpy_T", "adjoint")
def permute(site: Site) -> Axes:
    x = site.node.args[0]
    ndim = len(site.shape(x))
    name = site.node.target._schema.name  # type: ignore[union-attr]  # an OpOverload by registration
    order = list(range(ndim))
    if name.endswith("permute"):
        order = [int(d) % ndim for d in site.arg(1)]
    elif ndim >= 2:
        a, b = (site.arg(1) % ndim, site.arg(2) % ndim) if name.endswith("transpose") else (-2 % ndim, -1 % ndim)
        order[a], order[b] = b, a
    return permuted(site.axes(x), order)


@rule(Family.MOVEMENT, "unsqueeze", "squeeze")
def resize_ones(site: Site) -> Axes:
    """Only dims of size 1 come or go: a reshape."""
    return view(site)


@rule(Family.MOVEMENT, "expand", "broadcast_to", "expand_copy")
def expand(site: Site) -> Axes:
    """A dim of size 1 that is repeated follows whatever it meets: its copies are alike."""
    x = site.node.args[0]
    ndim = len(site.out)
    axes = shift(site.axes(x), len(site.shape(x)), ndim)
    old = (1,) * (ndim - len(site.shape(x))) + site.shape(x)
    grown = [d for d in range(ndim) if old[d] == 1 and site.out[d] > 1]
    return {**axes, **free_axes(site, site.out, grown)}


@rule(Family.MOVEMENT, "cat", "concat")
def cat(site: Site) -> Axes:
    parts = list(site.node.args[0])
    parts = [p for p in parts if site.shape(p) != (0,)]
    ndim = len(site.out)
    dim = int(site.arg(1, "dim", 0)) % ndim
    result: Axes = {}
    for d in range(ndim):
        tracks = [site.axes(p).get(d) for p in parts]
        if all(t is None for t in tracks):
            continue
        if d != dim:
            kept = [t for t in tracks if t is not None]
            if len(kept) < len(parts):
                for track in kept:
                    site.ledger.freeze(track, "is concatenated with a tensor whose size here is fixed")
            else:
                result[d] = _cat_rows(site, kept, parts, dim)
            continue
        filled = []
        for part, track in zip(parts, tracks, strict=True):
            size = site.shape(part)[dim]
            if track is None:  # entries that nobody may remove
                track = site.ledger.new(size).reshape([-1 if i == dim else 1 for i in range(ndim)])
                site.ledger.freeze(track, "is concatenated and its size is fixed")
            filled.append(track)
        rows = np.broadcast_shapes(*[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in filled])
        full = [np.broadcast_to(t, [t.shape[i] if i == dim else rows[i] for i in range(ndim)]) for t in filled]
        result[dim] = np.concatenate(full, axis=dim)
    return result


def _cat_rows(site: Site, tracks: list[Track], parts: list[fx.Node], dim: int) -> Track:
    """Tracks of another dim than the concatenated one: joined, or laid side by side where they vary along it."""
    if all(t.shape[dim] == 1 for t in tracks):
        return meet(site.ledger, tracks)
    sizes = [site.shape(p)[dim] for p in parts]
    rows = np.broadcast_shapes(*[tuple(1 if i == dim else n for i, n in enumerate(t.shape)) for t in tracks])
    full = [
        np.broadcast_to(t, [size if i == dim else rows[i] for i in range(t.ndim)]) for t, size in zip(tracks, sizes, strict=True)
    ]
    return np.concatenate(full, axis=dim)


@rule(Family.MOVEMENT, "stack")
def stack(site: Site) -> Axes:
    parts = list(site.node.args[0])
    dim = int(site.arg(1, "dim", 0)) % len(site.out)
    result: Axes = {}
    for d in {d for p in parts for d in site.axes(p)}:
        tracks = [site.axes(p).get(d) for p in parts]
        kept = [np.expand_dims(t, dim) for t in tracks if t is not None]
        if len(kept) < len(parts):
            for track in kept:
                site.ledger.freeze(track, "is stacked with a tensor whose size here is fixed")
            continue
        rows = np.broadcast_shapes(*[t.shape for t in kept])
        joined = np.concatenate([np.broadcast_to(t, rows) for t in kept], axis=dim)
        out = d + (d >= dim)
        if all(np.array_equal(k, kept[0]) for k in kept):
            joined = kept[0]
        elif len(kept) > 1:
            site.ledger.balance(joined, out)
        result[out] = joined
    return result


def sliced(axes: Axes, dim: int, start: int, stop: int, step: int = 1) -> Axes:
    """Tracks of x[..., start:stop:step, ...] along `dim`."""
    index = slice(start, stop, step)
    return {d: (t if t.shape[dim] == 1 and d != dim else t[(slice(None),) * dim + (index,)]) for d, t in axes.items()}


def _even_parts(site: Site, axes: Axes, dim: int, size: int, parts: int) -> None:
    """A dim that is cut into equal parts: each part keeps equally many (the code that cuts it halves what it finds)."""
    track = axes.get(dim)
    if track is not None and parts > 1 and size > 1:
        moved = np.moveaxis(track, dim, -1)
        site.ledger.balance(moved.reshape(*moved.shape[:-1], parts, size), moved.ndim)


@rule(Family.MOVEMENT, "slice")
def slice_(site: Site) -> Axes:
    x = site.node.args[0]
    shape = site.shape(x)
    dim, start, stop, step = normal_slice(site, shape)
    axes, size = site.axes(x), shape[dim]
    if dim in axes and step > 1:
        if size % step:
            axes = site.freeze(axes, [dim], "is sliced with a step")
        else:  # every block of `step` entries goes as one
            moved = np.moveaxis(axes[dim], dim, -1)
            blocks = moved.reshape(*moved.shape[:-1], size // step, step)
            site.ledger.collapse(blocks, blocks.ndim - 1)
    length = stop - start
    if dim in axes and step == 1 and 0 < length < size and size % length == 0 and size // length <= 4 and start % length == 0:
        _even_parts(site, axes, dim, length, size // length)
    return sliced(axes, dim, start, stop, step)


def normal_slice(site: Site, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(dim, start, stop, step) of a slice op, all of them plain and within the dim."""
    dim = int(site.arg(1, "dim", 0)) % len(shape)
    step = int(site.arg(4, "step", 1))
    start, stop, _ = slice(site.arg(2, "start"), site.arg(3, "end"), step).indices(shape[dim])
    return dim, start, max(start, stop), step


@rule(Family.MOVEMENT, "select")
def select(site: Site) -> Axes:
    x = site.node.args[0]
    ndim = len(site.shape(x))
    dim = int(site.arg(1)) % ndim
    index = int(site.arg(2)) % site.shape(x)[dim]
    axes = site.freeze(site.axes(x), [dim], "one entry of it is picked by number")
    return _picked(axes, dim, index)


def _picked(axes: Axes, dim: int, index: int) -> Axes:
    return {d - (d > dim): np.take(t, index if t.shape[dim] > 1 else 0, axis=dim) for d, t in axes.items()}


@rule(Family.MOVEMENT, "unbind")
def unbind(site: Site) -> tuple[Axes, ...]:
    x = site.node.args[0]
    shape = site.shape(x)
    dim = int(site.arg(1, "dim", 0)) % len(shape)
    axes = site.freeze(site.axes(x), [dim], "it is unbound into a fixed number of tensors")
    return tuple(_picked(axes, dim, i) for i in range(shape[dim]))


@rule(Family.MOVEMENT, "split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "split_with_sizes_copy")
def split(site: Site) -> tuple[Axes, ...]:
    """Parts of equal size keep equal sizes; parts of unequal size are independent."""
    x = site.node.args[0]
    dim = int(site.arg(2, "dim", 0)) % len(site.shape(x))
    sizes = [spec.shape[dim] for spec in site.node.meta["spec"]]
    axes = site.axes(x)
    if len(set(sizes)) == 1:
        _even_parts(site, axes, dim, sizes[0], len(sizes))
    ends = np.cumsum(sizes)
    return tuple(sliced(axes, dim, int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True))


@rule(Family.MOVEMENT, "slice_scatter")
def slice_scatter(site: Site) -> Axes:
    base, child = site.node.args[:2]
    shape = site.shape(base)
    dim = int(site.arg(2, "dim", 0)) % len(shape)
    start, stop, step = slice(site.arg(3, "start"), site.arg(4, "end"), site.arg(5, "step", 1)).indices(shape[dim])
    return _scattered(site, base, child, dim, start, stop, step)


def _scattered(site: Site, base: fx.Node, child: fx.Node, dim: int, start: int, stop: int, step: int) -> Axes:
    axes, inner = dict(site.axes(base)), dict(site.axes(child))
    window = sliced(axes, dim, start, stop, step)
    for d in set(axes) | set(inner):
        if d in window and d in inner:
            site.ledger.join(window[d], inner[d])
        elif site.shape(child)[d] > 1:
            for side in (axes, inner):
                if d in side:
                    site.ledger.freeze(side.pop(d), "meets a tensor whose size here is fixed")
    return {d: t for d, t in axes.items() if d in window}


@rule(Family.MOVEMENT, "select_scatter")
def select_scatter(site: Site) -> Axes:
    base, child = site.node.args[:2]
    ndim = len(site.shape(base))
    dim = int(site.arg(2)) % ndim
    axes = site.freeze(site.axes(base), [dim], "one entry of it is written by number")
    inner = {d + (d >= dim): np.expand_dims(t, dim) for d, t in site.axes(child).items()}
    for d in (set(axes) | set(inner)) - {dim}:
        if d in axes and d in inner:
            site.ledger.join(axes[d], inner[d])
        elif site.out[d] > 1:
            for side in (axes, inner):
                if d in side:
                    site.ledger.freeze(side.pop(d), "meets a tensor whose size here is fixed")
    return axes


@rule(Family.MOVEMENT, "flip")
def flip(site: Site) -> Axes:
    ndim = len(site.out)
    dims = [int(d) % ndim for d in site.arg(1)]
    return {d: np.flip(t, [i for i in dims if t.shape[i] > 1]) for d, t in site.axes(site.node.args[0]).items()}


@rule(Family.MOVEMENT, "roll")
def roll(site: Site) -> Axes:
    """Rolling along a dim without channels moves nothing that matters; along channels the shift is a number in the code."""
    ndim = len(site.out)
    dims = [int(d) % ndim for d in site.arg(2, "dims", [])] or list(range(ndim))
    axes = site.freeze(site.axes(site.node.args[0]), dims, "is rolled by a fixed number")
    return {
        d: np.roll(t, [s for s, i in zip(site.arg(1), dims, strict=False) if t.shape[i] > 1], [i for i in dims if t.shape[i] > 1])
        for d, t in axes.items()
    }


@rule(Family.MOVEMENT, "repeat", "tile")
def repeat(site: Site) -> Axes:
    x = site.node.args[0]
    ndim = len(site.out)
    old = (1,) * (ndim - len(site.shape(x))) + site.shape(x)
    counts = [new // size if size else 1 for new, size in zip(site.out, old, strict=True)]
    axes = {}
    for d, t in shift(site.axes(x), len(site.shape(x)), ndim).items():
        axes[d] = np.tile(t, [n if t.shape[i] > 1 else 1 for i, n in enumerate(counts)])
    grown = [d for d in range(ndim) if old[d] == 1 and site.out[d] > 1]
    return {**axes, **free_axes(site, site.out, grown)}


@rule(Family.MOVEMENT, "constant_pad_nd")
def constant_pad(site: Site) -> Axes:
    """Entries that padding adds belong to nobody: they get ids of no slot and follow what they meet."""
    x, pads = site.node.args[0], list(site.arg(1))
    ndim, shape = len(site.out), site.shape(site.node.args[0])
    axes = dict(site.axes(x))
    for i in range(len(pads) // 2):
        dim, (before, after) = ndim - 1 - i, pads[2 * i : 2 * i + 2]
        low, high = max(0, -before), shape[dim] - max(0, -after)
        axes = sliced(axes, dim, low, high)
        for d, track in list(axes.items()):
            if track.shape[dim] == 1 and d != dim:
                continue
            if d != dim:  # rows of another dim's track: the new rows are nobody's either
                site.ledger.freeze(axes.pop(d), "is padded along its rows")
                continue
            rows = [n if j != dim else 1 for j, n in enumerate(track.shape)]
            edges = [site.ledger.new((*rows[:dim], max(0, n), *rows[dim + 1 :])) for n in (before, after)]
            axes[d] = np.concatenate([edges[0], track, edges[1]], axis=dim)
    return axes


@rule(Family.MOVEMENT, "index", "_unsafe_index", "index_select", "gather", "take_along_dim")
def index(site: Site) -> Axes:
    """Entries picked by index tensors: the picked dims stay whole, the others pass."""
    x = site.node.args[0]
    shape, name = site.shape(x), site.node.target._schema.name  # type: ignore[union-attr]  # an OpOverload by registration
    reason = "is looked up by index"
    for tensor in site.tensors[1:]:
        site.ledger.freeze_all(site.axes(tensor), "is used as an index")
    if not name.endswith("index"):
        dim = int(site.arg(1)) % len(shape)
        axes = site.freeze(site.axes(x), [dim], reason)
        if name.endswith("gather"):
            return site.freeze(axes, range(len(shape)), reason)
        return {d: site.ledger.collapse(t, dim) for d, t in axes.items()}
    indices = [(d, i) for d, i in enumerate(site.arg(1)) if i is not None]
    picked = [d for d, _ in indices]
    if not picked:
        return dict(site.axes(x))
    axes = site.freeze(site.axes(x), picked, reason)
    for d in picked:
        axes = {k: site.ledger.collapse(t, d) for k, t in axes.items()}
    width = max(len(site.shape(i)) for _, i in indices)
    masks = any(str(i.meta["spec"].dtype) in ("torch.bool", "torch.uint8") for _, i in indices)
    if masks:
        site.freeze(axes, range(len(shape)), "is masked by a boolean index")
        return {}
    adjacent = picked == list(range(picked[0], picked[-1] + 1))
    place = picked[0] if adjacent else 0
    out: Axes = {}
    for d, t in axes.items():
        rest = [n for i, n in enumerate(t.shape) if i not in picked]
        position = d - sum(p < d for p in picked)
        new = rest[:place] + [1] * width + rest[place:]
        out[position if position < place else position + width] = t.reshape(new)
    return out


@rule(Family.MOVEMENT, "unfold")
def unfold_dim(site: Site) -> Axes:
    """Sliding windows along one dim: that dim stays whole."""
    x = site.node.args[0]
    dim = int(site.arg(1)) % max(1, len(site.shape(x)))
    axes = site.freeze(site.axes(x), [dim], "is unfolded into windows")
    return {d: site.ledger.collapse(t, dim)[..., None] for d, t in axes.items()}


@rule(Family.MOVEMENT, "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(site: Site) -> Axes:
    """Written out as view, permute, view: that is what these ops are."""
    x, factor = site.node.args[0], int(site.arg(1))
    *batch, c, h, w = site.shape(x)
    n, name = len(batch), site.node.target._schema.name  # type: ignore[union-attr]  # an OpOverload by registration
    lead = list(range(n))
    if name.endswith("pixel_shuffle"):
        grid = (*batch, c // factor**2, factor, factor, h, w)
        order = [*lead, n, n + 3, n + 1, n + 4, n + 2]
    elif name.endswith("pixel_unshuffle"):
        grid = (*batch, c, h // factor, factor, w // factor, factor)
        order = [*lead, n, n + 2, n + 4, n + 1, n + 3]
    else:
        grid = (*batch, factor, c // factor, h, w)
        order = [*lead, n + 1, n, n + 2, n + 3]
    axes = permuted(reshape(site.ledger, site.axes(x), site.shape(x), grid), order)
    return reshape(site.ledger, axes, tuple(grid[i] for i in order), site.out)
