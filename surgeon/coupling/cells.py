"""Cells of grids: which classes are cells that slots lie in, which atoms are rows, which groups rows and columns."""

from __future__ import annotations

import numpy as np

from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.ops.ids import DimIds


def cells_of(propagation: Propagation, solution: Solution) -> DimIds:
    """The classes of cells of grids that some slot's entries lie in; others are only met on the way, as a
    reshape merges dims.
    """
    found = np.zeros(len(solution.root), dtype=bool)
    met = np.zeros(len(solution.root), dtype=bool)
    for ids in propagation.slots.values():
        met[solution.root[ids]] = True
    while met.any():
        here = np.flatnonzero(met & (solution.row >= 0) & ~found)
        found[here] = True
        met = np.zeros(len(solution.root), dtype=bool)
        met[solution.row[here]] = met[solution.column[here]] = True
    return np.flatnonzero(found & ~solution.outer)


def is_row(solution: Solution, cells: DimIds) -> DimIds:
    """Which atoms are rows of a grid: they may touch the same slots as its columns, and are another group."""
    found = np.zeros(len(solution.root), dtype=bool)
    for atoms in solution.atoms(solution.row[cells]):
        found[atoms[atoms >= 0]] = True
    return found


def kinds_of(
    solution: Solution, cells: DimIds, groups_of: DimIds, families: list[DimIds]
) -> tuple[list[str], list[int]]:
    """Which groups are rows and which columns of a grid, and a number for each connected set of them."""
    count = len(families)
    kinds, grids = ["channels"] * count, list(range(count))
    batched = [bool(solution.batched[sets].any()) for sets in families]
    steps = [sets.shape[1] for sets in families]
    pairs: set[tuple[int, int]] = set()
    for rows in solution.atoms(solution.row[cells]):
        for columns in solution.atoms(solution.column[cells]):
            valid = (rows >= 0) & (columns >= 0)
            r, c = groups_of[rows[valid]], groups_of[columns[valid]]
            both = (r >= 0) & (c >= 0) & (r != c)
            r, c = np.divmod(np.unique(r[both] * count + c[both]), max(count, 1))
            pairs |= set(zip(r.tolist(), c.tolist(), strict=True))

    def leading(r: int, c: int) -> bool:
        return (not batched[r], steps[r], r) < (not batched[c], steps[c], c)

    def find(x: int) -> int:
        while grids[x] != x:
            x = grids[x]
        return x

    # a merge of dims may name rows and columns the other way round: rows are what ops compute one by one, or
    # the fewer
    pairs = {(r, c) for r, c in pairs if (c, r) not in pairs or leading(r, c)}
    for r, c in sorted(pairs):
        kinds[r] = "middle" if kinds[r] in ("columns", "middle") else "rows"
        kinds[c] = "middle" if kinds[c] in ("rows", "middle") else "columns"
        a, b = find(r), find(c)
        grids[max(a, b)] = min(a, b)
    return kinds, [find(i) if kinds[i] != "channels" else -1 for i in range(count)]
