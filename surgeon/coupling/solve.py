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
  or row of unowned ids alone, which are joined to no parameter's, never leaves;
- a frozen cell freezes its row and its column;
- a class that is all of some value's dim is frozen: it would leave nothing of it;
- what no op of the run computed with is frozen: the rest of a table of positions, which longer inputs need.
"""

from __future__ import annotations

import math

import numpy as np
from torch import fx

from surgeon.coupling.grids import close_parts, freeze_idle, orient, unite
from surgeon.coupling.solution import Solution, assemble
from surgeon.ops.ids import Constraints, DimIds, Freeze


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
    row, column = orient(root, frozen, constraints)
    owned = np.flatnonzero(~constraints.is_unowned(np.arange(n)))
    freezes = list(constraints.freezes)
    while True:
        root, frozen, changed = close_parts(root, frozen, cell, row, column, owned)
        changed |= _freeze_unbalanced(root, frozen, balances) or freeze_idle(
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
    return assemble(constraints, freezes, root, frozen, (cell, row, column, split), balances)


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
    firsts = np.array([dim_ids.flat[0] for dim_ids in constraints.dims.values()], dtype=np.int64)
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
