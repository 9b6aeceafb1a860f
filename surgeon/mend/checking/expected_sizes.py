"""wanted(node, shapes, choice) -> the sizes among an op's arguments as the small model must pass them.

One function per op that takes sizes; everything else has none. Derived from the ids alone: what stays of each
dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from surgeon.ops.context import OpContext
from surgeon.ops.families.moves.movement import dense
from surgeon.ops.families.moves.slicing import normal_slice
from surgeon.ops.ids import ValueIds
from surgeon.ops.table import op_name
from surgeon.selection.cost import Choice, ShapeModel

Want = Callable[[ShapeModel, Choice, OpContext], dict[str, Any]]


def _want_size(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    """Of a view: none if it changes the dtype alone."""
    return {"size": list(shapes.shape(ctx.node, choice))} if "size" in ctx.arguments else {}


def _want_identity(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    rows, columns = shapes.shape(ctx.node, choice)
    return {name: size for name, size in (("n", rows), ("m", columns)) if name in ctx.arguments}


def _want_slice(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    x = ctx["self"]
    dim, start, stop, step = normal_slice(ctx, ctx.shape(x))
    dim_ids = ctx.axes(x).get(dim)
    if dim_ids is None or start == stop < ctx.shape(x)[dim]:  # nothing, of whatever width
        return {}
    before = (
        _kept_before(shapes, choice, ctx.axes(x), dim, start - start % step) + start % step
    )  # blocks of `step` leave
    end = _kept_before(shapes, choice, ctx.axes(x), dim, stop)
    asked_start, asked_end, size = ctx["start"], ctx["end"], ctx.shape(x)[dim]
    want = {}
    if isinstance(asked_start, int) and asked_start not in (0,):
        want["start"] = before if asked_start > 0 else before - shapes.shape(x, choice)[dim]
    if isinstance(asked_end, int) and asked_end < size:
        want["end"] = end if asked_end >= 0 else end - shapes.shape(x, choice)[dim]
    return want


def _want_slice_scatter(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    x = ctx["self"]
    dim, start, stop, _ = normal_slice(ctx, ctx.shape(x))
    if dim not in ctx.axes(x) or start == stop:
        return {}
    return {
        "start": _kept_before(shapes, choice, ctx.axes(x), dim, start),
        "end": _kept_before(shapes, choice, ctx.axes(x), dim, stop),
    }


def _kept_before(shapes: ShapeModel, choice: Choice, axes: ValueIds, dim: int, position: int) -> int:
    """How many entries before `position` stay along `dim`."""
    gone = shapes.leaves(axes[dim], choice)
    head = gone[(slice(None),) * dim + (slice(0, position),)]
    return int((~head).sum(axis=dim).max(initial=0)) if position else 0


def _want_split(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    dim = int(ctx["dim"]) % len(ctx.shape(ctx["self"]))
    sizes = [shapes.shape(ctx.node, choice, i)[dim] for i in range(len(ctx.node.meta["spec"]))]
    if "split_sizes" in ctx.arguments:
        return {"split_sizes": sizes}
    return (
        {ctx.arguments.name("split_size"): sizes[0]}
        if ctx.shape(ctx["self"])[dim] != shapes.shape(ctx["self"], choice)[dim]
        else {}
    )


def _want_pad(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    pads, x = list(ctx["pad"]), ctx["self"]
    for place, width in enumerate(pads):
        node = ctx.node if width > 0 else x  # what a negative width cuts off is in the operand
        axes = shapes.propagation.axes[node]
        dim = len(ctx.out) - 1 - place // 2
        if dim not in axes:
            continue
        if place % 2:
            start = ctx.shape(node)[dim] - abs(width)
            kept = shapes.shape(node, choice)[dim] - _kept_before(shapes, choice, axes, dim, start)
        else:
            kept = _kept_before(shapes, choice, axes, dim, abs(width))
        pads[place] = kept if width > 0 else -kept
    return {"pad": pads}


def _want_convolution(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    x, weight = (shapes.shape(a, choice) for a in (ctx["input"], ctx["weight"]))
    out = shapes.shape(ctx.node, choice)
    return {"groups": (out[1] if ctx["transposed"] else x[1]) // weight[1]}


def _want_group_norm(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    x = ctx["input"]
    small, groups = shapes.shape(x, choice), int(ctx["group"])
    dim_ids = ctx.axes(x).get(1)
    if dim_ids is not None:
        gone = shapes.leaves(dim_ids, choice)
        first = gone.reshape(gone.shape[0], groups, -1, *gone.shape[2:])
        stays = ~first.all(axis=2)
        groups = int(stays.sum(axis=1).max())
    return {"N": small[0], "C": small[1], "group": groups}


def _want_layer_norm(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    count = len(ctx["normalized_shape"])
    return {"normalized_shape": list(shapes.shape(ctx["input"], choice)[-count:])}


def _want_repeat(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    x = shapes.shape(ctx["self"], choice)
    out = shapes.shape(ctx.node, choice)
    x = (1,) * (len(out) - len(x)) + x
    return {"repeats": [new // size if size else 1 for new, size in zip(out, x, strict=True)]}


def _want_as_strided(shapes: ShapeModel, choice: Choice, ctx: OpContext) -> dict[str, Any]:
    """Each stride is so many steps along each dim of what is read."""
    if "layout" not in ctx.node.meta:
        return {}
    layout, x = ctx.node.meta["layout"][0], ctx["self"]
    before, after = dense(ctx.shape(x), layout), dense(shapes.shape(x, choice), layout)
    strides = []
    for stride in ctx["stride"]:
        new, rest = 0, stride
        for old, small in sorted(zip(before, after, strict=True), reverse=True):
            count, rest = divmod(rest, old)
            new += count * small
        strides.append(new)
    return {"size": list(shapes.shape(ctx.node, choice)), "stride": strides}


_WANT: Mapping[str, Want] = {
    **dict.fromkeys(("view", "view_copy", "_unsafe_view", "reshape", "_reshape_alias"), _want_size),
    **dict.fromkeys(("expand", "expand_copy"), _want_size),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _want_size),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _want_size),
    **dict.fromkeys(("split", "split_with_sizes", "split_with_sizes_copy", "unsafe_split"), _want_split),
    "eye": _want_identity,
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
    """The sizes among an op's arguments, by position, as the small model must pass them.

    What is left to its default is no number of the code's, and needs no other.
    """
    rule = _WANT.get(op_name(node)) if node.op == "call_function" else None
    if rule is None:
        return {}
    ctx = OpContext(node, shapes.propagation.axes, shapes.propagation.constraints)
    found = {ctx.arguments.places[name]: value for name, value in rule(shapes, choice, ctx).items()}
    return {place: value for place, value in found.items() if place < len(node.args)}
