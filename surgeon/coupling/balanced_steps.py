"""find_balanced_sets(solution) -> BalancedSets: from balances to steps that keep them.

Atoms that stand equally often in the same balanced rows are one *balanced set*. A family of sets, connected by common
balances, shrinks in steps: so many units of each set leave at once that all rows of every balance lose
equally many.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgeon.coupling.solution import Solution
from surgeon.ops.ids import DimIds

_DROPPED, _TRIED = (
    5,
    200,
)  # sets that may be left out so that the others can shrink, and sets of them that are tried


@dataclasses.dataclass
class BalancedSets:
    """label[atom]: its set (0: none); steps_of: per family of sets, label -> how many of it one step must
    remove.
    """

    label: DimIds
    steps_of: dict[int, dict[int, int]]


@dataclasses.dataclass
class _Incidence:
    """Of one balance: how often each atom stands in each row, for the atoms that do not stand equally often
    in all.
    """

    atom: DimIds
    row: DimIds
    count: DimIds
    rows: int


def find_balanced_sets(solution: Solution) -> BalancedSets:
    """From balances to balanced sets: atoms with the same incidence in all balanced rows are one."""
    label = np.zeros(len(solution.root), dtype=np.uint64)
    random = np.random.default_rng(0)
    found: list[_Incidence] = []
    for matrix, _ in solution.balances:
        height = len(matrix)
        rows = np.broadcast_to(np.arange(height)[:, None], matrix.shape)
        keys = []
        for atoms in solution.atoms(matrix):
            loose = (atoms >= 0) & ~solution.frozen[atoms]
            keys.append(atoms[loose] * height + rows[loose])
        pairs, count = np.unique(np.concatenate(keys), return_counts=True)
        atom, row = pairs // height, pairs % height
        if not atom.size:
            continue
        starts = np.flatnonzero(np.r_[True, np.diff(atom) != 0])
        sizes = np.diff(np.r_[starts, atom.size])
        low, high = np.minimum.reduceat(count, starts), np.maximum.reduceat(count, starts)
        uneven = np.repeat((sizes != height) | (low != high), sizes)
        atom, row, count = atom[uneven], row[uneven], count[uneven]
        if atom.size:
            weights = random.integers(1, 1 << 62, size=height, dtype=np.uint64)
            np.add.at(label, atom, weights[row] * count.astype(np.uint64))
            found.append(_Incidence(atom, row, count, height))
    return BalancedSets(label, _steps_of(label, found, _roles(solution)))


def _roles(solution: Solution) -> DimIds:
    """atom -> 1 for rows of grids, 2 for columns, 3 for both, 0 for others."""
    cells = np.flatnonzero((solution.row >= 0) & ~solution.outer)
    found = np.zeros(len(solution.root), dtype=np.int64)
    for role, side in ((1, solution.row), (2, solution.column)):
        for atoms in solution.atoms(side[cells]):
            found[np.unique(atoms[atoms >= 0])] |= role
    return found


def _steps_of(label: DimIds, found: list[_Incidence], roles: DimIds) -> dict[int, dict[int, int]]:
    """For each set its family's step: the fewest units per set whose leaving keeps every balance. {} if
    there is none.
    """
    import networkx as nx

    families = nx.Graph()
    equations: dict[int, list[tuple[DimIds, DimIds, DimIds, int]]] = defaultdict(list)
    role: dict[int, int] = {}
    for item in found:
        labels = label[item.atom]
        role |= dict(zip(labels.tolist(), roles[item.atom].tolist(), strict=True))
        kinds, first = np.unique(labels, return_index=True)
        nx.add_path(families, kinds.tolist())
        shown = np.isin(item.atom, item.atom[first])  # one atom stands for its set
        equations[int(kinds[0])].append((labels[shown], item.row[shown], item.count[shown], item.rows))
    steps_of: dict[int, dict[int, int]] = {}
    population = dict(zip(*[x.tolist() for x in np.unique(label, return_counts=True)], strict=True))
    for family in nx.connected_components(families):
        sets = sorted(family)
        rows = [e for one_set in sets for e in equations.get(one_set, [])]
        for taken in _solve_steps(sets, rows, population, role):
            steps_of |= dict.fromkeys(taken, taken)
    return steps_of


def _solve_steps(
    sets: list[int],
    rows: list[tuple[DimIds, DimIds, DimIds, int]],
    population: dict[int, int],
    role: dict[int, int],
) -> list[dict[int, int]]:
    """Steps of balanced sets: in each, smallest positive counts such that all rows of every balance lose equally
    many.

    Sets that are alike (as many units, standing as often) form a step of their own where that keeps
    every balance: the parts of a row need not shrink in step. So do rows of grids, and columns: either is an
    alternative to the other. Sets of a single odd unit that make this impossible keep all of theirs.
    """
    place = {one_set: i for i, one_set in enumerate(sets)}
    blocks, counts = [], []
    for labels, row, count, height in rows:
        block = np.zeros((height, len(sets)), dtype=np.int64)
        np.add.at(block, (row, np.array([place[int(x)] for x in labels])), count)
        counts.append(block)
        blocks.append(block[1:] - block[:1])
    matrix = np.unique(np.concatenate(blocks), axis=0)
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    sides: dict[int, list[int]] = defaultdict(list)
    for i, one_set in enumerate(sets):
        kinds[(population[one_set], *np.sort(np.concatenate(counts)[:, i]).tolist())].append(i)
        sides[role[one_set]].append(i)
    if not any(matrix[:, own].sum(axis=1).any() for own in kinds.values()):
        return [{sets[i]: 1 for i in own} for own in kinds.values()]
    apart = [own for side in sides.values() for own in _connected(matrix, side)]
    for parts in (apart, [list(range(len(sets)))]):
        found = [_solve([sets[i] for i in own], matrix[:, own], population) for own in parts]
        if all(found):
            return found
    return []


def _connected(matrix: DimIds, sets: list[int]) -> list[list[int]]:
    """Those of the sets that equations bind to one another, apart from the others."""
    import networkx as nx

    bound = nx.Graph()
    bound.add_nodes_from(sets)
    for equation in matrix[:, sets]:
        nx.add_path(bound, [sets[i] for i in np.flatnonzero(equation)])
    return [sorted(own) for own in nx.connected_components(bound)]


def _solve(sets: list[int], matrix: DimIds, population: dict[int, int]) -> dict[int, int]:
    """One step of these sets, of which as few units as possible are left out; {} if there is none."""
    for kept in _subsets([population[one_set] for one_set in sets]):
        counts = _positive(matrix[:, kept])
        if counts is not None:
            return dict(zip([sets[i] for i in kept], counts, strict=True))
    return {}


def _subsets(sizes: list[int]) -> Iterator[list[int]]:
    """Lanes to try together: all of them, then without some, few units first."""
    every = range(len(sizes))
    dropped = itertools.chain.from_iterable(
        itertools.combinations(every, n) for n in range(min(len(sizes), _DROPPED))
    )
    tried = sorted(itertools.islice(dropped, _TRIED), key=lambda drop: sum(sizes[i] for i in drop))
    for drop in tried:
        yield [i for i in every if i not in drop]


def _positive(matrix: DimIds) -> list[int] | None:
    """Smallest positive counts per column that make every row vanish, if they are unique up to a factor or
    all one.
    """
    if not matrix.any(axis=0).all():  # a set that no equation binds: it is free by itself
        return None
    if not matrix.sum(axis=1).any():
        return [1] * matrix.shape[1]
    import sympy

    space = sympy.Matrix(matrix[matrix.any(axis=1)].tolist()).nullspace()
    if len(space) != 1:
        return None
    vector = [sympy.Rational(x) for x in space[0]]
    vector = [-x for x in vector] if vector[0] < 0 else vector
    if not all(x > 0 for x in vector):
        return None
    scale = sympy.ilcm(*[x.q for x in vector])
    return [int(x * scale) for x in vector]
