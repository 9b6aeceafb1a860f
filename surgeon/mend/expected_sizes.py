"""wanted(node, shapes, choice) -> the sizes among an op's arguments as the small model must pass them.

One function per op that takes sizes; everything else has none. Derived from the ids alone: what stays of each
dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from surgeon.ops.ids import ValueIds
from surgeon.ops.indexing import normal_slice
from surgeon.ops.movement import dense
from surgeon.ops.table import Site, op_name
from surgeon.selection.cost import Choice, ShapeModel

Want = Callable[[ShapeModel, Choice, Site], dict[int, Any]]


def _to_shape(position: int) -> Want:
    return lambda shapes, choice, site: {position: list(shapes.shape(site.node, choice))}


def _want_slice(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    x = site.args[0]
    dim, start, stop, step = normal_slice(site, site.shape(x))
    track = site.axes(x).get(dim)
    if track is None:
        return {}
    before = (
        _kept_before(shapes, choice, site.axes(x), dim, start - start % step) + start % step
    )  # blocks of `step` leave
    end = _kept_before(shapes, choice, site.axes(x), dim, stop)
    asked_start, asked_end, size = site.arg(2), site.arg(3), site.shape(x)[dim]
    want = {}
    if isinstance(asked_start, int) and asked_start not in (0,):
        want[2] = before if asked_start > 0 else before - shapes.shape(x, choice)[dim]
    if isinstance(asked_end, int) and asked_end < size:
        want[3] = end if asked_end >= 0 else end - shapes.shape(x, choice)[dim]
    return want


def _want_slice_scatter(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    x = site.args[0]
    dim = int(site.arg(2, "dim", 0)) % len(site.shape(x))
    if dim not in site.axes(x):
        return {}
    start, stop, _ = slice(site.arg(3), site.arg(4), site.arg(5, "step", 1)).indices(site.shape(x)[dim])
    return {
        3: _kept_before(shapes, choice, site.axes(x), dim, start),
        4: _kept_before(shapes, choice, site.axes(x), dim, stop),
    }


def _kept_before(shapes: ShapeModel, choice: Choice, axes: ValueIds, dim: int, position: int) -> int:
    """How many entries before `position` stay along `dim`."""
    gone = shapes.leaves(axes[dim], choice)
    head = gone[(slice(None),) * dim + (slice(0, position),)]
    return int((~head).sum(axis=dim).max(initial=0)) if position else 0


def _want_split(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    dim = int(site.arg(2, "dim", 0)) % len(site.shape(site.args[0]))
    sizes = [shapes.shape(site.node, choice, i)[dim] for i in range(len(site.node.meta["spec"]))]
    if op_name(site.node).endswith("with_sizes"):
        return {1: sizes}
    return {1: sizes[0]} if site.shape(site.args[0])[dim] != shapes.shape(site.args[0], choice)[dim] else {}


def _want_pad(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    pads, ndim = list(site.arg(1)), len(site.out)
    axes = shapes.propagation.axes[site.node]
    old, small = site.out, shapes.shape(site.node, choice)
    for i in range(len(pads) // 2):
        dim = ndim - 1 - i
        if dim in axes:
            if pads[2 * i] > 0:
                pads[2 * i] = _kept_before(shapes, choice, axes, dim, pads[2 * i])
            if pads[2 * i + 1] > 0:
                pads[2 * i + 1] = small[dim] - _kept_before(
                    shapes, choice, axes, dim, old[dim] - pads[2 * i + 1]
                )
    return {1: pads}


def _want_convolution(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    x, weight = (shapes.shape(a, choice) for a in site.args[:2])
    out = shapes.shape(site.node, choice)
    return {8: (out[1] if site.arg(6) else x[1]) // weight[1]}


def _want_group_norm(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    x = site.args[0]
    small, groups = shapes.shape(x, choice), int(site.arg(6))
    track = site.axes(x).get(1)
    if track is not None:
        gone = shapes.leaves(track, choice)
        first = gone.reshape(gone.shape[0], groups, -1, *gone.shape[2:])
        stays = ~first.all(axis=2)
        groups = int(stays.sum(axis=1).max())
    return {3: small[0], 4: small[1], 6: groups}


def _want_layer_norm(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    count = len(site.arg(1))
    return {1: list(shapes.shape(site.args[0], choice)[-count:])}


def _want_repeat(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    x = shapes.shape(site.args[0], choice)
    out = shapes.shape(site.node, choice)
    x = (1,) * (len(out) - len(x)) + x
    return {1: [new // size if size else 1 for new, size in zip(out, x, strict=True)]}


def _want_as_strided(shapes: ShapeModel, choice: Choice, site: Site) -> dict[int, Any]:
    """Each stride is so many steps along each dim of what is read."""
    if "layout" not in site.node.meta:
        return {}
    layout, x = site.node.meta["layout"][0], site.args[0]
    before, after = dense(site.shape(x), layout), dense(shapes.shape(x, choice), layout)
    strides = []
    for stride in site.arg(2):
        new, rest = 0, stride
        for old, small in sorted(zip(before, after, strict=True), reverse=True):
            count, rest = divmod(rest, old)
            new += count * small
        strides.append(new)
    return {1: list(shapes.shape(site.node, choice)), 2: strides}


_WANT: Mapping[str, Want] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"), _to_shape(1)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _to_shape(1)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _to_shape(0)),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _want_split),
    "as_strided": _want_as_strided,
    "slice": _want_slice,
    "slice_scatter": _want_slice_scatter,
    "constant_pad_nd": _want_pad,
    "convolution": _want_convolution,
    "native_group_norm": _want_group_norm,
    "native_layer_norm": _want_layer_norm,
    "repeat": _want_repeat,
}


def wanted(node: fx.Node, shapes: ShapeModel, choice: Choice) -> dict[int, Any]:
    """The sizes among an op's arguments, by position, as the small model must pass them."""
    rule = _WANT.get(op_name(node)) if node.op == "call_function" else None
    return (
        {}
        if rule is None
        else rule(shapes, choice, Site(node, shapes.propagation.axes, shapes.propagation.constraints))
    )
