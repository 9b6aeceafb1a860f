"""explain(analysis, name) -> Explanation: what a layer is tied to and through which ops, what is frozen, why,
and what to do.

The ties of one unit are a small networkx graph: its nodes are ids, its edges are the facts that rules wrote
down, each with the op that spoke. The way from one slot to another is a shortest path in it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from surgeon.coupling.analysis import Analysis
from surgeon.coupling.propagate import Propagation, Slot
from surgeon.coupling.solution import Solution
from surgeon.errors import InputError
from surgeon.graph.messages import where
from surgeon.ops.ids import DimIds

if TYPE_CHECKING:
    import networkx as nx

OUTPUT = "is the model's output"

_SHOWN = 6  # ways to other slots that the print-out of a slot names; the nearest come first
PLACES = ("kernel dim", "spatial dim")  # frozen because they are not channels at all

ADVICE = (
    (OUTPUT, 'name the outputs that you read: `outputs=["logits"]`; the others may then lose channels'),
    ("has no rule", "give the op a rule (docs/adding-an-op.md), or write it with ops that have one"),
    ("picked by number", "take a slice (x[:, :k]) instead of one entry if the code means a range"),
    ("part of a single entry", "take more than one entry, or none"),
    ("padded along its rows", "pad before the heads are taken apart, or after they are put together"),
    ("empty tensor", "nothing: there is nothing in it"),
    ("written by number", "write to a slice instead of to one entry"),
    ("unbound", "split into slices instead of unbinding, if the number of parts may change"),
    ("holds whole numbers", "nothing: they count or point, and are no channels"),
    ("reduced over", "pad or repeat after the reduction, or make the padding a parameter"),
    ("a product mixes with others", "pad after the product, or make the padding a parameter"),
    ("diagonal is read", "read the main diagonal of a square tensor: rows and columns then leave together"),
    ("rows are compared", "nothing: each pair of rows has its place in the result"),
    ("statistics that are read", "nothing: they count how many entries there are"),
    ("picked by expert", "nothing yet: whole experts cannot leave, only the channels within them"),
    ("by index", "index along another dim: entries that are looked up by number must all be there"),
    ("used as an index", "nothing: values that serve as indices must stay as they are"),
    (
        "an index is computed",
        "reduce with max or sum instead of argmax or topk if the position does not matter",
    ),
    ("sliced with a step", "make the width a multiple of the step"),
    (
        "size here is fixed",
        "make the other tensor a parameter or buffer, or compute its size from the model's tensors",
    ),
    ("and its size is fixed", "make the other tensor a parameter or buffer of the model"),
    (
        "computes its size from one that is frozen",
        "unfreeze that one, or compute the size from this layer's own tensors",
    ),
    (
        "keep as many as a part that is frozen",
        "unfreeze the other part: equal parts of one tensor lose equally many",
    ),
    ("no small combination", "use widths with a common divisor, so that all parts can lose equally many"),
    ("spatial dim", "nothing: this is a dim of the image, not a channel"),
    ("kernel dim", "nothing: this is a dim of the kernel, not a channel"),
    ("runs along it", "nothing as long as this op runs along the channels"),
    ("rolled", "roll along a spatial dim, or not at all"),
    ("factor of", "nothing: each channel stands for one place of the image"),
    ("imaginary part", "nothing: a complex number has both parts"),
    ("is sliced where", "use widths that have a divisor in common with the place where they are sliced"),
    ("unfolded", "unfold along a spatial dim"),
    (
        "windows of memory",
        "let `as_strided` step through channels from end to end, with windows along other dims alone",
    ),
    ("leaves torch", "compute it with torch's own ops, or after the model"),
    (
        "makes anew",
        "make the table once, in __init__, as long as any input needs it; or compute it from the tensor that reads it",
    ),
    ("boolean index", "multiply with the mask instead of indexing by it"),
)


def advice(reason: str) -> str:
    """What would unfreeze channels that are frozen for this reason; "" if nothing is known."""
    return next((text for key, text in ADVICE if key in reason), "")


@dataclasses.dataclass(frozen=True)
class Tie:
    """Another slot that loses channels together with the explained one, and the ops between them in order."""

    slot: Slot
    ops: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Stuck:
    """Channels of a slot that may not leave."""

    count: int
    reason: str
    node: fx.Node | None

    @property
    def advice(self) -> str:
        """What would unfreeze it, "" where nothing would."""
        return advice(self.reason)


@dataclasses.dataclass(frozen=True)
class SlotExplanation:
    """One slot: its width, the groups that its channels belong to, what they are tied to, and what of it is
    frozen.

    Attributes:
        graph: the ties of its first channel that may leave: ids, joined by facts; edges carry `node`, the op.
            Ids that are indices of slots carry `slot`.
    """

    slot: Slot
    width: int
    groups: tuple[str, ...]
    ties: tuple[Tie, ...]
    frozen: tuple[Stuck, ...]
    graph: nx.Graph

    def __str__(self) -> str:
        name, dim = self.slot
        lines = [
            f"{name}[{dim}]: {self.width} channels"
            + (f", in {' and '.join(self.groups)}" if self.groups else "")
        ]
        through: dict[tuple[fx.Node, ...], list[str]] = {}
        for tie in self.ties:
            through.setdefault(tie.ops, []).append(f"{tie.slot[0]}[{tie.slot[1]}]")
        for ops, slots in list(through.items())[:_SHOWN]:
            lines += [f"  with {', '.join(slots)}", *(f"    through {where(node)}" for node in ops)]
        if len(through) > _SHOWN:
            lines.append(f"  and {sum(map(len, list(through.values())[_SHOWN:]))} more slots, see .ties")
        for stuck in self.frozen:
            at = (
                f", {where(stuck.node)}"
                if stuck.node is not None and stuck.node.op == "call_function"
                else ""
            )
            lines.append(f"  frozen: {stuck.count} of {self.width}: {stuck.reason}{at}")
            if stuck.advice:
                lines.append(f"    to unfreeze: {stuck.advice}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `Surgery.explain` found, slot by slot; printable."""

    name: str
    slots: tuple[SlotExplanation, ...]

    def __str__(self) -> str:
        return "\n".join(str(slot) for slot in self.slots)


def explain(analysis: Analysis, name: str) -> Explanation:
    """See `Surgery.explain`."""
    slots = analysis.propagation.slots
    tensor, bracket, dim = name.partition("[")
    wanted = [slot for slot in slots if _names(slot[0], tensor) and (not bracket or dim == f"{slot[1]}]")]
    if not bracket:
        places = {slot for f in analysis.frozen if any(key in f.reason for key in PLACES) for slot in f.slots}
        wanted = [slot for slot in wanted if slot not in places] or wanted
    if not wanted:
        raise InputError(
            f"there is nothing called {name!r} to explain",
            why="it is no module with parameters, no parameter or buffer, and no slot such as 'conv1.weight[0]'",
            fix="use names as in model.named_modules() or model.named_parameters()",
        )
    return Explanation(name, tuple(_explained(analysis, slot) for slot in wanted))


def _names(tensor: str, asked: str) -> bool:
    return tensor == asked or asked == "" or tensor.startswith(f"{asked}.")


def _explained(analysis: Analysis, slot: Slot) -> SlotExplanation:
    propagation, solution = analysis.propagation, analysis.solution
    ids = propagation.slots[slot]
    roots = solution.root[ids]
    loose = ids[~solution.frozen[roots]]
    import networkx as nx

    graph = nx.Graph()
    ties: tuple[Tie, ...] = ()
    if loose.size:
        graph = ties_of(propagation, solution, int(loose[0]))
        ties = tuple(_ties(graph, slot, int(loose[0])))
    groups = tuple(g.name for g in analysis.groups if slot in g.slots)
    frozen = [Stuck(f.count, f.reason, f.node) for f in analysis.frozen if slot in f.slots]
    return SlotExplanation(slot, len(ids), groups, ties, tuple(frozen), graph)


def ties_of(propagation: Propagation, solution: Solution, unit: int) -> nx.Graph:
    """All ids that leave with `unit`, as a graph: an edge is a fact, its `node` the op whose rule wrote it
    down.
    """
    atoms = np.array([int(a[0]) for a in solution.atoms(np.array([unit])) if a[0] >= 0])

    def leaves(ids: DimIds) -> DimIds:
        return np.asarray(np.any([np.isin(part, atoms) for part in solution.atoms(ids)], axis=0))

    import networkx as nx

    graph = nx.Graph()
    graph.add_node(unit)
    for join in propagation.constraints.joins:
        _edges(graph, join.left, join.right, join.node, leaves)
    for part in propagation.constraints.parts:
        for side in (part.row, part.column):
            _edges(graph, part.cell, side, part.node, leaves)
    for slot, ids in propagation.slots.items():
        for i in ids[leaves(ids)]:
            graph.add_node(int(i), slot=slot)
    return graph


def _edges(
    graph: nx.Graph, left: DimIds, right: DimIds, node: fx.Node | None, leaves: Callable[[DimIds], DimIds]
) -> None:
    both = leaves(left) & leaves(right)
    graph.add_edges_from(zip(left[both].tolist(), right[both].tolist(), strict=True), node=node)


def _ties(graph: nx.Graph, own: Slot, unit: int) -> Iterator[Tie]:
    import networkx as nx

    paths = nx.single_source_shortest_path(graph, unit)
    seen = {own}
    for end, path in sorted(paths.items(), key=lambda item: len(item[1])):
        slot = graph.nodes[end].get("slot")
        if slot is None or slot in seen:
            continue
        seen.add(slot)
        ops = [graph.edges[edge]["node"] for edge in itertools.pairwise(path)]
        yield Tie(slot, tuple(dict.fromkeys(op for op in ops if op is not None)))
