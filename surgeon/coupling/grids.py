"""What follows of classes whose ids are cells of grids: rows and columns that are one, and frozen ones.

A grid's parts are three arrays of ids: cell[i] leaves if and only if row[i] or column[i] does."""

from __future__ import annotations

import numpy as np

from surgeon.ops.ids import Constraints, DimIds


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


def orient(root: DimIds, frozen: DimIds, constraints: Constraints) -> tuple[DimIds, DimIds]:
    """Rows and columns of all parts, with those of merged dims swapped where that ties less.

    Of a split it is known which is the row and which the column. Of a merge of two dims it is not (after a
    channel shuffle the columns are outside), so it is compared with the first part that shares cells with it,
    both ways, and the way that leaves more classes is taken.
    """
    empty = np.zeros(0, dtype=np.int64)
    if not constraints.parts:
        return empty, empty
    rows, columns = [p.row for p in constraints.parts], [p.column for p in constraints.parts]
    owner, owners_place = np.full(len(root), -1, dtype=np.int64), np.zeros(len(root), dtype=np.int64)
    is_row, is_column = np.zeros(len(root), dtype=bool), np.zeros(len(root), dtype=bool)
    for part in constraints.parts:
        if part.split:
            is_row[root[part.row]] = is_column[root[part.column]] = True
    order = sorted(range(len(constraints.parts)), key=lambda i: not constraints.parts[i].split)
    if all(part.split for part in constraints.parts):
        return np.concatenate(rows), np.concatenate(columns)
    for number in order:
        part = constraints.parts[number]
        classes = root[part.cell]
        if not part.split and is_row[root[part.column]].all() and is_column[root[part.row]].all():
            rows[number], columns[number] = part.column, part.row
        elif not part.split:
            known = owner[classes]
            for other in dict.fromkeys(known[known >= 0].tolist()):
                here = np.flatnonzero(known == other)
                there = owners_place[classes[here]]
                r, c = root[part.row[here]], root[part.column[here]]
                r2, c2 = root[rows[other][there]], root[columns[other][there]]
                if frozen[r2].all() or frozen[c2].all():
                    continue
                if _classes_left(r, r2) + _classes_left(c, c2) <= _classes_left(r, c2) + _classes_left(c, r2):
                    rows[number], columns[number] = part.column, part.row
                break
        new, first = np.unique(classes, return_index=True)
        first = first[owner[new] < 0]
        owner[classes[first]], owners_place[classes[first]] = number, first
    return np.concatenate(rows), np.concatenate(columns)


def _classes_left(left: DimIds, right: DimIds) -> int:
    """How many classes remain after uniting two arrays entry by entry."""
    _, index = np.unique(np.concatenate([left, right]), return_inverse=True)
    united = unite(np.arange(index.max() + 1), index[: left.size], index[left.size :])
    return len(np.unique(united))


def close_parts(
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
    """Which classes hold unowned ids only: so far they are joined to nothing that could be removed."""
    found = np.ones(len(root), dtype=bool)
    found[root[owned]] = False
    return found


def freeze_idle(
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
