"""propagate(graph, ...) -> Propagation: give every slot its ids and let each op say which belong together.

Walks the graph once in order; all knowledge of ops is in `rules`. The model's outputs are frozen here, and so
are tensors that are not the model's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from surgeon.capture.sizes.traced_size import Follows
from surgeon.graph.graph import HELD, Graph, spec
from surgeon.graph.messages import source_line
from surgeon.ops.context import OpContext
from surgeon.ops.ids import Constraints, DimIds, ValueIds
from surgeon.ops.invariants import settled
from surgeon.ops.table import Family, family, op_name, rule_of

Slot = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Propagation:
    """What is known after the walk.

    Attributes:
        constraints: every fact about ids.
        slots: (tensor name, dim) -> the ids of its indices, 1-d.
        axes: node -> the ids of its dims (a tuple of them where the op has several outputs).
    """

    constraints: Constraints
    slots: Mapping[tuple[str, int], DimIds]
    axes: Mapping[fx.Node, Any]


def propagate(graph: Graph, *further: Graph) -> Propagation:
    """Run every op's rule once. Linear in the number of ops.

    Args:
        graph: the recorded run.
        further: other runs of the same model (its training mode, say); the slots are the same, so what any of
            them ties is tied.
    """
    constraints = Constraints()
    slots: dict[tuple[str, int], DimIds] = {}
    axes: dict[fx.Node, Any] = {}
    made: dict[str, ValueIds] = {}
    for run in (graph, *further):
        fed = {node for _, node in run.inputs}
        for node in run.fx.nodes:
            constraints.node = node
            if node.op == "get_attr":
                name = str(node.target)
                if name not in made or name not in run.owned:
                    made[name] = _slot_axes(run, name, node, constraints, slots)
                axes[node] = made[name]
            elif node.op == "placeholder":
                axes[node] = {}
            elif node.op == "call_function":
                axes[node] = settled(node, rule_of(node)(OpContext(node, axes, constraints)), constraints)
                for part in _parts(axes[node]):
                    constraints.value(part)
                if not fed.isdisjoint(node.all_input_nodes):
                    fed.add(node)
                _read(node, axes, node in fed, constraints)
            if isinstance(axes.get(node), dict):
                _follow(node, axes, constraints)
        for path, node in run.outputs:
            constraints.node = node
            constraints.freeze_all(axes[node], f"is the model's output '{path}'")
        for read in run.reads:
            if read.node is not None:
                constraints.node = read.node
                line = source_line(read.source)
                constraints.freeze_all(axes[read.node], f"leaves torch by {read.how} at {line}")
    constraints.node = None
    return Propagation(constraints, slots, axes)


def _read(node: fx.Node, axes: dict[fx.Node, Any], fed: bool, constraints: Constraints) -> None:
    """What an op computes with: everything, of values that come from the model's inputs; else what it sums or
    normalises over.

    Others may be cut off later on: the rest of a table that was only converted, scaled or added to another
    one.
    """
    kind = family(op_name(node))
    given = [part for source in node.all_input_nodes for part in _parts(axes[source])]
    if fed and kind not in (Family.MOVEMENT, Family.FACTORY):
        for part in given:
            constraints.read(part)
    elif kind in (Family.CONTRACTION, Family.REDUCTION, Family.OPAQUE):
        passed = [dim_ids.ravel() for part in _parts(axes[node]) for dim_ids in part.values()]
        gone = np.concatenate(passed) if passed else np.zeros(0, dtype=np.int64)
        for part in given:
            constraints.read({dim: np.setdiff1d(dim_ids, gone) for dim, dim_ids in part.items()})


def _parts(axes: Any) -> tuple[ValueIds, ...]:
    """The ids of each output of an op."""
    return axes if isinstance(axes, tuple) else (axes,)


def _follow(node: fx.Node, axes: dict[fx.Node, Any], constraints: Constraints) -> None:
    """Dims, and parts of them, whose sizes are computed from other sizes."""
    for dim, source in node.meta.get("follows", {}).items():
        own, other = axes[node].get(dim), _of_source(axes, source)
        if own is None and not node.all_input_nodes:  # made anew, of whatever size
            continue
        same = (
            spec(node).shape[dim] == spec(source.node).shape[source.dim]
        )  # a multiple may hold another number that changes
        _share(constraints, own, other, same)
    for cut in node.meta.get("cuts", ()):
        own, other = axes[node].get(cut.dim), _of_source(axes, cut.source)
        if (
            own is not None
            and other is not None
            and np.array_equal(_line(own, cut.dim), _line(other, cut.source.dim))
        ):
            line = _line(own, cut.dim)
            if math.gcd(cut.last - cut.first, line.size) == 1 < line.size:
                constraints.freeze(
                    own, "is sliced where its code computes, and no smaller width has the same share there"
                )
            else:
                constraints.share(line[cut.first : cut.last], line)
            continue
        same = cut.last - cut.first == spec(cut.source.node).shape[cut.source.dim]
        _share(
            constraints,
            None if own is None else np.moveaxis(own, cut.dim, -1)[..., cut.first : cut.last],
            other,
            same,
        )


def _of_source(axes: dict[fx.Node, Any], source: Follows) -> DimIds | None:
    found = axes.get(source.node, {})
    return found.get(source.dim) if isinstance(found, dict) else None


def _share(constraints: Constraints, own: DimIds | None, other: DimIds | None, same: bool) -> None:
    """Write down that the ids of two dims keep the same share, if one of them is fixed only where both are of the
    `same` size.
    """
    if (own is not None and other is not None) or (same and (own is not None or other is not None)):
        nothing = np.zeros(0, dtype=np.int64)
        constraints.share(nothing if own is None else own, nothing if other is None else other)


def _line(dim_ids: DimIds, dim: int) -> DimIds:
    """The ids along a dim, of its first row."""
    found: DimIds = np.moveaxis(dim_ids, dim, -1).reshape(-1, dim_ids.shape[dim])[0]
    return found


def _slot_axes(
    graph: Graph, name: str, node: fx.Node, constraints: Constraints, slots: dict[tuple[str, int], DimIds]
) -> ValueIds:
    shape = spec(node).shape
    if name not in graph.owned:
        free = not name.startswith(HELD) and _is_repeated(graph.tensors[name])
        return _fresh(constraints, shape) if free else {}
    axes = _fresh(constraints, shape)
    if name in graph.rebuilt and not _is_repeated(graph.tensors[name]):
        line = source_line(graph.rebuilt[name])
        constraints.freeze_all(
            axes,
            f"is state that the model's code makes anew, for a longer input say, at {line}"
            " (if an earlier call left it there, put back what was there at first)",
        )
    dtype = spec(node).dtype
    for dim, dim_ids in axes.items():
        slots[name, dim] = dim_ids.ravel()
    if not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool:
        constraints.freeze_all(axes, "holds whole numbers, such as positions")
        return {}
    return axes


def _is_repeated(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one constant throughout."""
    return not tensor.is_meta and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _fresh(constraints: Constraints, shape: tuple[int, ...]) -> ValueIds:
    ndim = len(shape)
    return {
        dim: np.ascontiguousarray(constraints.new(size).reshape([-1 if d == dim else 1 for d in range(ndim)]))
        for dim, size in enumerate(shape)
        if size > 1
    }
