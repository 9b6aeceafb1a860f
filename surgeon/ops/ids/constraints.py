"""Constraints: facts about ids, and the ids of dims that are merged or cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.ops.ids.facts import DimIds, Facts, Part, ValueIds, ascending, varies


class Constraints(Facts):
    """`Facts`, and what the ops that merge and cut dims write: parts of grids."""

    def __init__(self) -> None:
        super().__init__()
        self._splits: dict[tuple[bytes, tuple[int, ...]], ValueIds] = {}
        self._cells: dict[bytes, DimIds] = {}
        self._factors: dict[bytes, tuple[DimIds, DimIds]] = {}

    def compose(self, outer: DimIds, inner: DimIds) -> DimIds:
        """Ids of the entries of a merged dim: an entry leaves if its outer or its inner id does.

        Example: a value of 2 x 3 with ids 0, 1 on its rows and 2, 3, 4 on its columns is flattened. Its six entries
        get ids 5 ... 10, and entry 6 (row 0, column 1), for one, leaves if and only if 0 or 3 does.

        >>> constraints = Constraints()
        >>> rows, columns = constraints.new((2, 1)), constraints.new((1, 3))
        >>> constraints.compose(rows, columns)
        array([ 5,  6,  7,  8,  9, 10])
        >>> part = constraints.parts[0]
        >>> part.cell[1], part.row[1], part.column[1]
        (np.int64(6), np.int64(0), np.int64(3))
        """
        shape = np.broadcast_shapes(outer.shape, inner.shape)
        outer, inner = self._spread(outer, shape), self._spread(inner, shape)
        key = b"".join((outer.tobytes(), b"|", inner.tobytes()))
        known = self._cells.get(key)
        if known is None:
            if ascending(inner):  # no pair occurs twice
                known = self.new(inner.size)
                self.parts.append(Part(known, outer, inner, False, self.node))
            else:
                pairs, index = np.unique(np.stack([outer, inner]), axis=1, return_inverse=True)
                cells = self.new(pairs.shape[1])
                known = cells[index.ravel()]
                self.parts.append(Part(cells, pairs[0], pairs[1], False, self.node))
            self.mark_unowned(known[self._unowned[outer] | self._unowned[inner]])
            loose = self._unowned[outer] & self._unowned[inner] & ~self._met[outer] & ~self._met[inner]
            self._met[known[~loose]] = True
            self._cells[key] = known
            self._factors[known.tobytes()] = outer, inner
        return known

    def split(self, dim_ids: DimIds, dims: Sequence[int]) -> ValueIds:
        """Ids of the dims that one dim was cut into; `dim_ids` varies along several of `dims`, given from
        outer to inner.

        One dim: `dim_ids` itself. Several: the innermost gets columns, the outer ones rows, recursively.

        Example: six channels 0 ... 5 are seen as 2 x 3 (`view(2, 3)`). The two rows get ids 6 and 7. Each row has
        columns of its own, 8, 9, 10 and 11, 12, 13: row 0 may lose its first column where row 1 loses its last, but
        both lose equally many, which is a balance. Channel 4 (row 1, column 1) leaves if and only if 7 or 12 does.

        >>> constraints = Constraints()
        >>> axes = constraints.split(constraints.new(6).reshape(2, 3), (0, 1))
        >>> axes[0].tolist(), axes[1].tolist()
        ([[6], [7]], [[8, 9, 10], [11, 12, 13]])
        >>> constraints.balances[0].matrix.tolist()
        [[8, 9, 10], [11, 12, 13]]
        >>> part = constraints.parts[0]
        >>> part.cell[4], part.row[4], part.column[4]
        (np.int64(4), np.int64(7), np.int64(12))
        """
        dims = [d for d in dims if dim_ids.shape[d] > 1 and varies(dim_ids, d)]
        if not dims:
            return {}
        if len(dims) == 1:
            (dim,) = dims
            if any(dim_ids.shape[d] > 1 for d in range(dim_ids.ndim) if d != dim):
                self.balance(dim_ids, dim)
            return {dim: dim_ids}
        key = (dim_ids.tobytes(), (*dim_ids.shape, *dims))
        known = self._splits.get(key)
        if known is not None:
            return dict(known)
        factors = self._unmerged(dim_ids, dims)
        if factors is not None:
            return factors
        last = dims[-1]
        flat = np.moveaxis(dim_ids, last, -1)
        if ascending(dim_ids):  # every id once: every row and every cell is its own
            row = np.moveaxis(self.new((*flat.shape[:-1], 1)), -1, last)
            column = self.new(dim_ids.shape)
        else:
            rows, row_index = np.unique(flat.reshape(-1, flat.shape[-1]), axis=0, return_inverse=True)
            row = np.moveaxis(self.new(len(rows))[row_index.ravel()].reshape(*flat.shape[:-1], 1), -1, last)
            cells, cell_index = np.unique(dim_ids, return_inverse=True)
            column = self.new(len(cells))[cell_index.ravel()].reshape(dim_ids.shape)
        full_row = np.broadcast_to(row, dim_ids.shape)
        for ids in (full_row, column):
            self.mark_unowned(ids[self._unowned[dim_ids]])
            self._met[ids[self._met[dim_ids]]] = True
        self.parts.append(Part(dim_ids.ravel(), full_row.ravel(), column.ravel(), True, self.node))
        self.balance(column, last)
        axes = self.split(row, dims[:-1])
        axes[last] = column
        self._splits[key] = dict(axes)
        self._cells[b"".join((full_row.ravel().tobytes(), b"|", column.ravel().tobytes()))] = dim_ids.ravel()
        return axes

    def _spread(self, ids: DimIds, shape: tuple[int, ...]) -> DimIds:
        """Ids that are broadcast, in a row; of which factors they are made stays known."""
        wide = np.broadcast_to(ids, shape).ravel()
        factors = self._factors.get(ids.tobytes())
        if factors is not None and wide.size > ids.size:
            outer, inner = (self._spread(f.reshape(ids.shape), shape) for f in factors)
            self._factors[wide.tobytes()] = outer, inner
        return wide

    def _unmerged(self, dim_ids: DimIds, dims: Sequence[int]) -> ValueIds | None:
        """The ids that a merged dim was made of, if those of each dim vary along one of the dims that it is
        cut into.
        """
        if dim_ids.size != np.prod([dim_ids.shape[d] for d in dims]):
            return None
        factors = self._factors_along(dim_ids, dims)
        if factors is None:
            return None
        axes: ValueIds = {}
        for dim, ids in factors:
            axes[dim] = self.compose(axes[dim], ids).reshape(ids.shape) if dim in axes else ids
        return axes

    def _factors_along(self, ids: DimIds, dims: Sequence[int]) -> list[tuple[int, DimIds]] | None:
        """The factors, from outer to inner, each with the dim that it varies along."""
        along = [d for d in dims if varies(ids, d)]
        if len(along) > 1:
            known = self._factors.get(ids.tobytes())
            parts = [self._factors_along(f.reshape(ids.shape), dims) for f in known or ()]
            return None if not parts or None in parts else [pair for part in parts for pair in part or ()]
        dim = along[0] if along else dims[0]
        for other in dims:
            ids = ids if other == dim else np.take(ids, [0], axis=other)
        return [(dim, ids)]

    def merge(self, axes: ValueIds, dims: Sequence[int], shape: tuple[int, ...]) -> DimIds | None:
        """Ids over `dims` (outer to inner, adjacent), full along those that matter; None if all of them
        are fixed.

        Ids that vary along a dim inside their own are made constant along it: the order of what stays
        would otherwise differ from the order of the merged dim.

        Example: six channels 0 ... 5, seen as 2 x 3 and flattened again, are the same six ids: what `split` made
        of them is remembered. Turned before that (3 x 2, so the columns, which differ by row, are outside), the
        columns of both rows are joined first (8 with 11, 9 with 12, 10 with 13), and the entries are new.

        >>> constraints = Constraints()
        >>> axes = constraints.split(constraints.new(6).reshape(2, 3), (0, 1))
        >>> constraints.merge(axes, (0, 1), (2, 3)).tolist()
        [[0, 1, 2], [3, 4, 5]]
        >>> turned = {0: axes[1].T, 1: axes[0].T}
        >>> constraints.merge(turned, (0, 1), (3, 2)).tolist()
        [[14, 15], [16, 17], [18, 19]]
        >>> [(join.left.tolist(), join.right.tolist()) for join in constraints.joins]
        [([8, 11, 9, 12, 10, 13], [8, 8, 9, 9, 10, 10])]
        """
        merged: DimIds | None = None
        for position, dim in enumerate(dims):
            dim_ids = axes.get(dim)
            if dim_ids is None:
                continue
            for inner in dims[position + 1 :]:
                dim_ids = self.collapse(dim_ids, inner)
            if merged is None:
                merged = dim_ids
            else:
                full = np.broadcast_shapes(merged.shape, dim_ids.shape)
                merged = self.compose(merged, dim_ids).reshape(full)
        if merged is None:
            return None
        full = tuple(shape[d] if d in dims else merged.shape[d] for d in range(len(shape)))
        return np.broadcast_to(merged, full)
