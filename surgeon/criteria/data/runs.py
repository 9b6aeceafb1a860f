"""Runs: which recorded run a batch is held against, and which consumers it shows.

A batch of another size may run other ops in the same layers (a product of a transposed tensor is one op for
one sample and three for several). Where it does, it is recorded anew; its ids are translated by the slots
that they touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from surgeon.capture.aligned_run import repeated, same
from surgeon.capture.batches import record
from surgeon.coupling.propagate import Propagation, propagate
from surgeon.coupling.solution import Solution
from surgeon.coupling.solve import solve
from surgeon.criteria.data.consumers import Atoms, Consumer
from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where as location
from surgeon.graph.tensors import tensor_leaves
from surgeon.ops.ids import DimIds

Find = Callable[[Graph, Propagation, Atoms], list[Consumer]]
ShapeModel = tuple[tuple[str, tuple[int, ...]], ...]


class Runs:
    """Recorded runs by the shapes of their inputs, each with its consumers in the order of the first
    run's.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, propagation: Propagation, solution: Solution, find: Find
    ) -> None:
        self.model, self.graph, self.propagation, self.solution, self.find = (
            model,
            graph,
            propagation,
            solution,
            find,
        )
        self.consumers = find(graph, propagation, solution.atoms)
        self._known: dict[ShapeModel, tuple[Graph, list[Consumer]]] = {
            _shapes(graph.args, graph.kwargs): (graph, self.consumers)
        }

    def of(self, args: Any, kwargs: Any, label: str) -> tuple[Graph, Sequence[Consumer]]:
        """The run to hold a batch against, and its consumers.

        Raises:
            InputError: the model does not run on it, or its products are others than those of the example
                inputs.
        """
        shapes = _shapes(args, kwargs)
        if shapes not in self._known:
            self._known[shapes] = self._recorded(args, kwargs, label)
        return self._known[shapes]

    def _recorded(self, args: Any, kwargs: Any, label: str) -> tuple[Graph, list[Consumer]]:
        fix = "let data yield what the model takes; if it yields pairs (inputs, targets), pass loss=... too"
        run = record(self.model, args, kwargs, label, fix)
        ours, theirs = repeated(self.graph), repeated(run)
        if len(ours) == len(theirs) and all(same(a, b.op) for a, b in zip(ours, theirs, strict=True)):
            return self.graph, self.consumers
        propagation = propagate(run)
        solution = solve(propagation.constraints)
        table = _translation(propagation, solution, self.propagation, self.solution)
        found = self.find(
            run, propagation, lambda ids: [np.where(a >= 0, table[a], -1) for a in solution.atoms(ids)]
        )
        if len(found) != len(self.consumers) or not all(map(_alike, found, self.consumers)):
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if not same(a, b.op)),
                len(ours) - 1,
            )
            raise InputError(
                f"{label} takes another path through the model's code than the example inputs",
                where=f"op {place}: {location(ours[place].node)}",
                why=f"{len(found)} products read the groups' channels, {len(self.consumers)} did with the example inputs"
                if len(found) != len(self.consumers)
                else "other products read the groups' channels",
                fix="pass batches like the example inputs, or a criterion that does not look at activations, such as 'l1'",
            )
        return run, found


def _alike(left: Consumer, right: Consumer) -> bool:
    """Whether two consumers read the same channels in the same order."""
    if left.shape != right.shape:
        return False
    return np.array_equal(np.unique(_pairs(left), axis=0), np.unique(_pairs(right), axis=0))


def _pairs(consumer: Consumer) -> DimIds:
    """Rows (entry, atom)."""
    found = [np.stack([np.flatnonzero(a >= 0), a[a >= 0]], axis=1) for a in consumer.atoms]
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *found])


def _shapes(args: Any, kwargs: Any) -> ShapeModel:
    return tuple((path, tuple(tensor.shape)) for path, tensor in tensor_leaves((tuple(args), dict(kwargs))))


def _translation(
    propagation: Propagation, solution: Solution, old_propagation: Propagation, old_solution: Solution
) -> DimIds:
    """Atom -> the atom of the old solution that touches all that it touches, and least else; -1 if there is
    none.
    """
    slots = {slot: number for number, slot in enumerate(old_propagation.slots)}
    key, atom = _touches(propagation, solution, slots)
    old_key, old_atom = _touches(old_propagation, old_solution, slots)
    order = np.argsort(old_key, kind="stable")
    old_key, old_atom = old_key[order], old_atom[order]
    first, last = np.searchsorted(old_key, key), np.searchsorted(old_key, key, side="right")
    counts = last - first
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    pairs, met = np.unique(np.stack([np.repeat(atom, counts), old_atom[place]]), axis=1, return_counts=True)
    mine, theirs = pairs
    size, old_size = (
        np.bincount(atom, minlength=len(solution.root)),
        np.bincount(old_atom, minlength=len(old_solution.root)),
    )
    whole = met == size[mine]
    mine, theirs = mine[whole], theirs[whole]
    order = np.argsort(old_size[theirs], kind="stable")[::-1]  # the smallest last: it stays
    table = np.full(len(solution.root), -1, dtype=np.int64)
    table[mine[order]] = theirs[order]
    return table


def _touches(
    propagation: Propagation, solution: Solution, slots: dict[tuple[str, int], int]
) -> tuple[DimIds, DimIds]:
    """Parallel arrays (number of a slot's index, atom)."""
    keys, found = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for slot, ids in propagation.slots.items():
        for atoms in solution.atoms(ids):
            valid = np.flatnonzero(atoms >= 0)
            keys.append((slots.get(slot, len(slots)) << 32) + valid)
            found.append(atoms[valid])
    return np.concatenate(keys), np.concatenate(found)
