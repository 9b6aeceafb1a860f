"""Solution: the classes of ids, what may leave, and what leaves with what."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
from torch import fx

from surgeon.ops.ids import Constraints, DimIds, Freeze

_DEPTH = 8  # grids within grids; deeper ones are frozen


@dataclasses.dataclass(frozen=True)
class Solution:
    """Classes of ids.

    Attributes:
        root: id -> its class.
        frozen: id -> whether its class may not leave (read at class ids).
        row, column: class -> row and column class of a composite, -1 for an atom.
        outer: class -> whether the grid is a flattened outer product, whose factors are independent channels.
        batched: class -> whether some op computes its entries one by one, as attention does heads.
        heads, head_dims: class -> whether attention computes it one by one, or sums over it or gives it.
        freezes: the freezes of the constraints, for `why`.
        balances: (matrix of ids, node): every row keeps equally many.
    """

    root: DimIds
    frozen: DimIds
    row: DimIds
    column: DimIds
    outer: DimIds
    batched: DimIds
    heads: DimIds
    head_dims: DimIds
    freezes: tuple[Freeze, ...]
    balances: tuple[tuple[DimIds, fx.Node | None], ...]

    def why(self, ids: DimIds) -> tuple[str, fx.Node | None]:
        """(reason, node) of the first freeze that holds one of the ids, directly or through a grid."""
        known = [self.root[ids], *(atoms[atoms >= 0] for atoms in self.atoms(ids))]
        first = min(int(self._first_freeze[part].min(initial=len(self.freezes))) for part in known)
        if first < len(self.freezes):
            return self.freezes[first].reason, self.freezes[first].node
        return "must keep as many as a part that is frozen", None

    @cached_property
    def _first_freeze(self) -> DimIds:
        """Of each class, the place of the first freeze that holds it."""
        found = np.full(len(self.root), len(self.freezes), dtype=np.int64)
        for place in reversed(range(len(self.freezes))):
            found[self.root[self.freezes[place].ids]] = place
        return found

    def atoms(self, ids: DimIds) -> list[DimIds]:
        """Arrays like `ids` of the atoms whose leaving takes each entry along; -1 where there are fewer."""
        todo: list[DimIds] = [self.root[ids]]
        found: list[DimIds] = []
        for _ in range(_DEPTH):
            if not todo:
                return found
            following = []
            for classes in todo:
                valid = classes >= 0
                composite = valid & (self.row[classes] >= 0)
                if not composite.any():
                    found.append(classes)
                    continue
                following.append(np.where(composite, self.row[classes], -1))
                following.append(np.where(composite, self.column[classes], -1))
                rest = np.where(composite, -1, classes)
                if (rest >= 0).any():
                    found.append(rest)
            todo = following
        return found + todo

    def leaves(self, ids: DimIds, removed: DimIds) -> DimIds:
        """Which entries leave when the classes marked in `removed` (a mask over ids) do."""
        gone = np.zeros(ids.shape, dtype=bool)
        for atoms in self.atoms(ids):
            gone |= removed[atoms] & (atoms >= 0)
        return gone


def assemble(
    constraints: Constraints,
    freezes: list[Freeze],
    root: DimIds,
    frozen: DimIds,
    parts: tuple[DimIds, ...],
    balances: list[tuple[DimIds, fx.Node | None]],
) -> Solution:
    cell, row, column, split = parts
    of_row, of_column = np.full(len(root), -1, dtype=np.int64), np.full(len(root), -1, dtype=np.int64)
    outer = np.zeros(len(root), dtype=bool)
    if cell.size:
        c, r, k = root[cell], root[row], root[column]
        proper = (c != r) & (c != k)
        of_row[c[proper]], of_column[c[proper]] = r[proper], k[proper]
        of_grid = np.zeros(len(root), dtype=bool)
        of_grid[r[split]] = of_grid[k[split]] = True
        outer[c[proper]] = True
        outer[c[proper & (split | of_grid[r] | of_grid[k])]] = False
    marks = [np.zeros(len(root), dtype=bool) for _ in range(3)]
    for mark, all_ids in zip(
        marks, (constraints.batched, constraints.heads, constraints.head_dims), strict=True
    ):
        for ids in all_ids:
            mark[root[ids]] = True
    batched, heads, head_dims = marks
    while (
        parts_of := _unmarked_parts(heads, of_row, of_column)
    ).size:  # heads that share keys lie in a grid of their own
        heads[parts_of] = batched[parts_of] = True
    return Solution(
        root, frozen, of_row, of_column, outer, batched, heads, head_dims, tuple(freezes), tuple(balances)
    )


def _unmarked_parts(mark: DimIds, of_row: DimIds, of_column: DimIds) -> DimIds:
    """Rows and columns of marked classes that are not marked yet."""
    found = np.concatenate([of_row[mark], of_column[mark]])
    found = found[found >= 0]
    unmarked: DimIds = found[~mark[found]]
    return unmarked
