"""ties(...) -> pairs of groups that one number of the code ties: where cuts that give them unequal shares cannot be
mended, cuts that give them equal ones may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch.utils._pytree as pytree
from torch import fx

from surgeon.capture.aligned_run import repeated
from surgeon.coupling.groups import find_groups
from surgeon.graph.graph import Graph, spec
from surgeon.mend.checking.notes import Note
from surgeon.ops.table import op_name
from surgeon.selection.cost import ShapeModel

Links = tuple[tuple[str, str], ...]


def ties(
    first: Sequence[Note], left: Sequence[Note], runs: Sequence[Graph], shapes: ShapeModel
) -> tuple[Links, ...]:
    """Pairs of groups to link, the fewest first.

    Args:
        first: every size that was wrong before anything was changed.
        left: those that could not be changed.
    """
    modules = {note.module for note in left}
    alike = [
        note
        for note in first
        if any(
            note.old == other.old and (note.module == other.module or note.want == other.got)
            for other in left
        )
    ]
    near = [note for note in first if note.module in modules]
    groups = _Groups(runs, shapes)
    every = _of_size(runs, modules, {abs(note.old) for note in left})
    return tuple(groups.linked([*left, *notes]) for notes in (alike, near, every))


def _of_size(runs: Sequence[Graph], modules: Collection[str], sizes: Collection[int]) -> list[Note]:
    """All ops of modules that were given one of these numbers, wrong or not: this choice may have left them as they
    were.
    """
    found = []
    for graph in runs:
        for at, call in enumerate(repeated(graph)):
            numbers = pytree.tree_leaves((call.node.args, call.node.kwargs)) if call.module in modules else ()
            for old in {abs(n) for n in numbers if type(n) is int} & set(sizes):
                found.append(Note(at, call.module, call.source, op_name(call.node), old, old, old))
    return found


class _Groups:
    """The groups that the sizes of ops hold."""

    def __init__(self, runs: Sequence[Graph], shapes: ShapeModel) -> None:
        self.shapes = shapes
        self.names: list[str] = []
        self.of_atom = np.full(len(shapes.solution.root), -1, dtype=np.int64)
        for number, group in enumerate(find_groups(shapes.propagation, shapes.solution)[0]):
            self.names.append(group.name)
            self.of_atom[group.sets.ravel()] = number
        self.nodes: dict[tuple[int, str, str], list[fx.Node]] = {}
        for graph in runs:
            for at, call in enumerate(repeated(graph)):
                self.nodes.setdefault((at, call.module, op_name(call.node)), []).append(call.node)

    def linked(self, notes: Iterable[Note]) -> Links:
        """All groups of these sizes in a row."""
        found = sorted({number for note in notes for number in self._of(note)})
        return tuple((self.names[a], self.names[b]) for a, b in itertools.pairwise(found))

    def _of(self, note: Note) -> Iterator[int]:
        for node in self.nodes.get((note.call, note.module, note.op), ()):
            for ids in self._ids(node, note):
                for atoms in self.shapes.solution.atoms(ids.ravel()):
                    yield from set(self.of_atom[atoms[atoms >= 0]].tolist()) - {-1}

    def _ids(self, node: fx.Node, note: Note) -> list[np.ndarray]:
        """The ids of the dims of an op's result that a size counts; of all dims, if it is none of the result's."""
        axes = self.shapes.propagation.axes.get(node, {})
        own = axes[0] if isinstance(axes, tuple) else axes
        shape = spec(node).shape
        dims = [note.place] if 0 <= note.place < len(shape) and shape[note.place] == note.old else list(own)
        return [own[dim] for dim in dims if dim in own]
