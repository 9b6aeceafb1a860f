"""solve(constraints) -> Solution: draw all conclusions from the facts about ids, once, in bulk.

Joined ids form a *class*, named by its smallest id. A class is *composite* if its ids are cells of a grid: it
leaves if and only if its row class or its column class leaves. All other classes are *atoms*, the things that
can be chosen.

Conclusions, repeated until nothing changes:

- one class, two grids: a cell with two (row, column) pairs means that the rows are one and the columns are
  one (cutting a dim in two ways ties the coarser rows' parts together: sound, though it gives up some
  freedom);
- a frozen column makes a cell the same as its row, a frozen row the same as its column;
- a cell that is its own row leaves with every column, one that is its own column with every row: but a column
  or row of free ids alone, which met nothing of a tensor's, never leaves;
- a frozen cell freezes its row and its column;
- a class that is all of some value's dim is frozen: it would leave nothing of it;
- what no op of the run computed with is frozen: the rest of a table of positions, which longer inputs need.
"""

from __future__ import annotations

import dataclasses
import math

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
        wanted = np.zeros(len(self.root), dtype=bool)
        wanted[self.root[ids]] = True
        for atoms in self.atoms(ids):
            wanted[atoms[atoms >= 0]] = True
        for freeze in self.freezes:
            if wanted[self.root[freeze.ids]].any():
                return freeze.reason, freeze.node
        return "must keep as many as a part that is frozen", None

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


def solve(constraints: Constraints) -> Solution:
    """See the module's text. The cost is linear in the number of facts, up to a few passes.

    Example: six channels 0 ... 5 are seen as 2 x 3: rows 6, 7 and columns 8 ... 13 (see `Constraints.split`). The
    channels are composites; rows and columns are what can be chosen. An op that sums over the rows joins their
    columns: 8, 9, 10 are left.

    >>> constraints = Constraints()
    >>> channels = constraints.new(6)
    >>> axes = constraints.split(channels.reshape(2, 3), (0, 1))
    >>> constraints.read(axes)
    >>> _ = constraints.collapse(axes[1], 0)
    >>> solution = solve(constraints)
    >>> solution.root[axes[1]].tolist()
    [[8, 9, 10], [8, 9, 10]]
    >>> int(solution.row[4]), int(solution.column[4])
    (7, 9)

    If channel 4 may not leave, neither may its row 7 nor its column 9. Of that row, channel 3 then leaves just when
    column 8 does: they are one class.

    >>> constraints.freeze(channels[4], "is read elsewhere")
    >>> solution = solve(constraints)
    >>> solution.frozen[solution.root[[7, 9]]].tolist()
    [True, True]
    >>> bool(solution.root[3] == solution.root[8])
    True
    """
    n = constraints.count
    root = np.arange(n, dtype=np.int64)
    frozen = np.zeros(n, dtype=bool)
    if constraints.joins:
        left = np.concatenate([j.left for j in constraints.joins])
        right = np.concatenate([j.right for j in constraints.joins])
        root = unite(root, left, right)
    if constraints.freezes:
        frozen[root[np.concatenate([f.ids for f in constraints.freezes])]] = True
    cell = (
        np.concatenate([p.cell for p in constraints.parts])
        if constraints.parts
        else np.zeros(0, dtype=np.int64)
    )
    split = (
        np.concatenate([np.full(p.cell.size, p.split) for p in constraints.parts])
        if constraints.parts
        else cell.astype(bool)
    )
    balances = [(b.matrix, b.node) for b in constraints.balances]
    for share in constraints.shares:
        matrix = _parts_alike(root, share.own, share.other)
        if matrix is not None:
            balances.append((matrix, share.node))
    row, column = _orient(root, frozen, constraints)
    owned = np.flatnonzero(~constraints.is_unowned(np.arange(n)))
    freezes = list(constraints.freezes)
    while True:
        root, frozen, changed = _close_parts(root, frozen, cell, row, column, owned)
        changed |= _freeze_unbalanced(root, frozen, balances) or _freeze_idle(
            root, frozen, cell, row, column, owned
        )
        if not changed:
            unread = _unread(root, frozen, cell, row, column, constraints.is_read)
            alone = _alone(root, frozen, constraints)
            if not unread.size and not alone.size:
                break
            freezes.append(Freeze(unread, "is not read for this input, but may be for others", None))
            freezes.append(
                Freeze(alone, "would leave nothing of a tensor that the model computes with", None)
            )
            frozen[unread] = frozen[alone] = True
    return _assemble(constraints, freezes, root, frozen, (cell, row, column, split), balances)


def _parts_alike(root: DimIds, own: DimIds, other: DimIds) -> DimIds | None:
    """The balance that keeps a part of a dim and the rest at the same share; None if `own` is no part of
    `other`.

    Both are repeated until they are of one length.
    """
    rest = other[~np.isin(root[other], root[own])]
    if not rest.size or not own.size or rest.size + own.size != other.size:
        return None
    common = math.lcm(own.size, rest.size)
    return np.stack([np.tile(ids, common // ids.size) for ids in (own, rest)])


def unite(root: DimIds, left: DimIds, right: DimIds) -> DimIds:
    """Connected components after adding the edges left-right; `root` maps every id to the smallest of its
    component.
    """
    root = root.copy()
    while True:
        a, b = root[left], root[right]
        differ = a != b
        if not differ.any():
            return root
        low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
        left, right = left[differ], right[differ]
        np.minimum.at(root, high, low)
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped


def _orient(root: DimIds, frozen: DimIds, constraints: Constraints) -> tuple[DimIds, DimIds]:
    """Rows and columns of all parts, with those of merged dims swapped where that ties less.

    A split knows its row from its column. A merge of two dims does not (after a channel shuffle the columns
    are outside), so it is compared with the first part that shares cells with it, both ways, and the way that
    leaves more classes is taken.
    """
    empty = np.zeros(0, dtype=np.int64)
    if not constraints.parts:
        return empty, empty
    rows, columns = [p.row for p in constraints.parts], [p.column for p in constraints.parts]
    owner: dict[int, tuple[int, int]] = {}
    is_row, is_column = np.zeros(len(root), dtype=bool), np.zeros(len(root), dtype=bool)
    for part in constraints.parts:
        if part.split:
            is_row[root[part.row]] = is_column[root[part.column]] = True
    order = sorted(range(len(constraints.parts)), key=lambda i: not constraints.parts[i].split)
    for number in order:
        part = constraints.parts[number]
        classes = root[part.cell].tolist()
        if not part.split and is_row[root[part.column]].all() and is_column[root[part.row]].all():
            rows[number], columns[number] = part.column, part.row
        elif not part.split:
            meets: dict[int, list[tuple[int, int]]] = {}
            for place, found in enumerate(classes):
                known = owner.get(found)
                if known is not None:
                    meets.setdefault(known[0], []).append((place, known[1]))
            for other, places in meets.items():
                here, there = np.array(places).T
                r, c = root[part.row[here]], root[part.column[here]]
                r2, c2 = root[rows[other][there]], root[columns[other][there]]
                if frozen[r2].all() or frozen[c2].all():
                    continue
                if _classes_left(r, r2) + _classes_left(c, c2) <= _classes_left(r, c2) + _classes_left(c, r2):
                    rows[number], columns[number] = part.column, part.row
                break
        for place, found in enumerate(classes):
            owner.setdefault(found, (number, place))
    return np.concatenate(rows), np.concatenate(columns)


def _classes_left(left: DimIds, right: DimIds) -> int:
    """How many classes remain after uniting two arrays entry by entry."""
    _, index = np.unique(np.concatenate([left, right]), return_inverse=True)
    united = unite(np.arange(index.max() + 1), index[: left.size], index[left.size :])
    return len(np.unique(united))


def _close_parts(
    root: DimIds, frozen: DimIds, cell: DimIds, row: DimIds, column: DimIds, owned: DimIds
) -> tuple[DimIds, DimIds, bool]:
    """Apply the three conclusions about grids until they hold."""
    changed = False
    while cell.size:
        c, r, k = root[cell], root[row], root[column]
        idle = _idle(root, owned)
        left, right = [], []
        fr, fk = frozen[r], frozen[k]
        real = np.flatnonzero(~fr & ~fk & (c != r) & (c != k))
        order = real[np.argsort(c[real], kind="stable")]
        same = c[order][1:] == c[order][:-1]
        for side in (r, k):  # one class, two grids
            left.append(side[order][:-1][same])
            right.append(side[order][1:][same])
        left += [c[fk], c[fr]]
        right += [r[fk], k[fr]]
        # a cell that is its own row (column) leaves with every column (row), unless that one is frozen and
        # never does
        own_row, own_column = (c == r) & ~fk & ~idle[k], (c == k) & ~fr & ~idle[r]
        left += [c[own_row], c[own_column]]
        right += [k[own_row], r[own_column]]
        united = unite(root, np.concatenate(left), np.concatenate(right))
        marked = np.zeros_like(frozen)
        marked[united[np.flatnonzero(frozen)]] = True
        c, r, k = united[cell], united[row], united[column]
        marked[k[marked[c]]] = True  # then the cell is the same as its row, which is frozen with it
        both = marked[r] & marked[k]
        marked[c[both]] = True
        if np.array_equal(united, root) and np.array_equal(marked[united], frozen[root]):
            return united, marked, changed
        root, frozen, changed = united, marked, True
    marked = np.zeros_like(frozen)
    marked[root[np.flatnonzero(frozen)]] = True
    return root, marked, changed


def _idle(root: DimIds, owned: DimIds) -> DimIds:
    """Which classes hold free ids only: so far they met nothing that could take them along."""
    found = np.ones(len(root), dtype=bool)
    found[root[owned]] = False
    return found


def _freeze_idle(
    root: DimIds, frozen: DimIds, cell: DimIds, row: DimIds, column: DimIds, owned: DimIds
) -> bool:
    """Rows that met nothing, of cells that are their own columns, never leave: a batch that learned queries
    are repeated for.
    """
    c, r, k = root[cell], root[row], root[column]
    idle = _idle(root, owned) & ~frozen
    found = np.concatenate([k[(c == r) & (c != k) & idle[k]], r[(c == k) & (c != r) & idle[r]]])
    frozen[found] = True
    return bool(found.size)


def _unread(
    root: DimIds, frozen: DimIds, cell: DimIds, row: DimIds, column: DimIds, is_read: DimIds
) -> DimIds:
    """Classes that may leave so far, but that no op computed with, nor with a cell, row or column of them."""
    found = np.zeros(len(root), dtype=bool)
    found[root[is_read]] = True
    c, r, k = root[cell], root[row], root[column]
    while cell.size:
        before = np.count_nonzero(found)
        for a, b in ((c, r), (c, k), (r, c), (k, c)):
            found[b[found[a]]] = True
        if np.count_nonzero(found) == before:
            break
    return np.unique(root[~found[root] & ~frozen[root]])


def _alone(root: DimIds, frozen: DimIds, constraints: Constraints) -> DimIds:
    """Classes that may leave so far and are the only one along a dim of a value."""
    firsts = np.array([track.flat[0] for track in constraints.dims.values()], dtype=np.int64)
    loose = ~frozen[root[firsts]]
    found = [
        root[i]
        for i, t, may in zip(firsts, constraints.dims.values(), loose, strict=True)
        if may and (root[t] == root[i]).all()
    ]
    return np.unique(np.array(found, dtype=np.int64))


def _freeze_unbalanced(root: DimIds, frozen: DimIds, balances: list[tuple[DimIds, fx.Node | None]]) -> bool:
    """A row that cannot lose anything freezes the rows that must keep as many as it does."""
    changed = False
    for matrix, _ in balances:
        classes = root[matrix]
        loose = ~frozen[classes]
        if loose.any() and not loose.any(axis=1).all():
            frozen[classes[loose]] = True
            changed = True
    return changed


def _assemble(
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
    for mark, tracks in zip(
        marks, (constraints.batched, constraints.heads, constraints.head_dims), strict=True
    ):
        for ids in tracks:
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
