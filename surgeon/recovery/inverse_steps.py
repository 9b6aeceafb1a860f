"""Affine steps and moves behind a product, undone: what a step was given, from its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from surgeon.capture.recording.aliasing import getitem
from surgeon.criteria.data.consumers import normalises, only_reader
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.families.elementwise import affine
from surgeon.ops.families.moves.movement import permutation
from surgeon.ops.table import Trait, has, op_name


def norm_behind(node: fx.Node, graph: Graph) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of the batch norm in eval mode that alone reads a product, in float64; None if there is
    none.
    """
    reader = only_reader(node)
    if reader is None or not normalises(reader, node) or trains(reader):
        return None
    held = {
        name: graph.tensors[str(a.target)].double() if isinstance(a, fx.Node) and a is not node else a
        for name, a in arguments(reader).items()
    }
    return norm_affine(held)


def trains(node: fx.Node) -> bool:
    """Whether a batch norm uses the statistics of its batch."""
    return bool(arguments(node).get("training"))


def back(node: fx.Node, value: Tensor, given: Mapping[str, Any]) -> Tensor:
    """What a step was given, from its result and its other operands, by name."""
    name = op_name(node)
    if has(name, Trait.BATCH_NORM):
        scale, shift = norm_affine(given)
        shape = [-1 if d == 1 else 1 for d in range(value.dim())]
        return (value - shift.reshape(shape)) / scale.reshape(shape)
    if node.target is getitem or has(name, Trait.COPIES):
        return value
    step = affine(name, given)
    if step is not None:
        scale, shift = step
        found: Tensor = (value - shift) / scale
        return found
    if has(name, Trait.PERMUTES):
        order = permutation(arguments(node), value.dim())
        return value.permute([order.index(d) for d in range(value.dim())])
    return value.reshape(spec(arguments(node)["self"]).shape)


def norm_affine(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, from its arguments."""
    weight, bias, mean, var = (given[name] for name in ("weight", "bias", "running_mean", "running_var"))
    scale = (var + given["epsilon" if "epsilon" in given else "eps"]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
