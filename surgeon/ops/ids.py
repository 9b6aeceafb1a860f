"""Channel ids: integers on the entries of values, and a constraints of what must leave together.

A value carries `ValueIds`: for each of its dims that can shrink, a *track*, an integer array that is
broadcastable to the value's shape, full along that dim, and gives the id of every entry. A dim without a
track is fixed. A track may also vary along other dims, its *rows*: in a value of heads x head_dim the track
of the second dim may give each head its own ids, and then every row must lose equally many entries so that
what stays is rectangular.

The `Constraints` collects facts and never compares ids while it does; `solve` draws all conclusions at once
(see `groups`):

- joins:    a and b leave together.
- freezes:  a may not leave, with the reason.
- parts:    p leaves if and only if row or column leaves (p is a cell of a grid, or an index of a flattened
  outer product).
- balances: a matrix of ids of which every row keeps equally many.
- shares:   ids that keep the same share as others: the model's code computes how many there are from how many
  others there are.
- free:     ids of nobody's slot (padding, expanded dims): they follow what they meet.
- reduced:  entries that are summed or normalised over: free ones among them stay, because it matters how many
  there are.
- batched:  ids of rows that an op computes one by one (heads, groups).
- read:     ids that an op computes with; others of a tensor were only cut off (a table that is longer than
  the input).
- dims:     the tracks of values: something must stay of each.
- heads, head_dims: ids that batched products of activations compute one by one, or sum over and give
  (attention).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from torch import fx

DimIds = np.ndarray
ValueIds = dict[int, DimIds]


@dataclasses.dataclass(frozen=True)
class Join:
    left: DimIds
    right: DimIds
    node: fx.Node | None


@dataclasses.dataclass(frozen=True)
class Freeze:
    ids: DimIds
    reason: str
    node: fx.Node | None


@dataclasses.dataclass(frozen=True)
class Part:
    """cell[i] leaves iff row[i] or column[i] leaves. `split`: made by cutting a dim, so row and column are
    alternatives.
    """

    cell: DimIds
    row: DimIds
    column: DimIds
    split: bool
    node: fx.Node | None


@dataclasses.dataclass(frozen=True)
class Balance:
    matrix: DimIds
    node: fx.Node | None


@dataclasses.dataclass(frozen=True)
class Share:
    """`own` and `other` keep the same share. No ids for a dim that is fixed."""

    own: DimIds
    other: DimIds
    node: fx.Node | None


class Constraints:
    """Gives out ids and writes down facts about them. `node` is the op whose rule is speaking."""

    def __init__(self) -> None:
        self.count = 0
        self.joins: list[Join] = []
        self.freezes: list[Freeze] = []
        self.parts: list[Part] = []
        self.balances: list[Balance] = []
        self.shares: list[Share] = []
        self.batched: list[DimIds] = []
        self.heads: list[DimIds] = []
        self.head_dims: list[DimIds] = []
        self.dims: dict[int, DimIds] = {}
        self._unowned = np.zeros(1 << 10, dtype=bool)
        self._read = np.zeros(1 << 10, dtype=bool)
        self.node: fx.Node | None = None
        self._balanced: set[tuple[int, bytes]] = set()
        self._even: dict[tuple[int, int], DimIds] = {}
        self._splits: dict[tuple[bytes, tuple[int, ...]], ValueIds] = {}
        self._cells: dict[bytes, DimIds] = {}
        self._factors: dict[bytes, tuple[DimIds, DimIds]] = {}

    def new(self, shape: int | tuple[int, ...]) -> DimIds:
        """Fresh ids in an array of the given shape."""
        size = int(np.prod(shape))
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        if self.count > len(self._unowned):
            self._unowned, self._read = (
                np.concatenate([m, np.zeros(self.count, dtype=bool)]) for m in (self._unowned, self._read)
            )
        return ids

    def mark_unowned(self, ids: DimIds) -> None:
        """These entries come from nobody's tensor: they follow what they meet, and nothing shows which of
        them left.
        """
        self._unowned[ids] = True

    def is_unowned(self, ids: DimIds) -> DimIds:
        found: DimIds = self._unowned[ids]
        return found

    def value(self, axes: ValueIds) -> None:
        """An op gives a value with these tracks."""
        self.dims |= {id(track): track for track in axes.values() if track.size}

    def read(self, axes: ValueIds) -> None:
        """An op computes with these entries."""
        for track in axes.values():
            self._read[track] = True

    @property
    def is_read(self) -> DimIds:
        """id -> whether an op computes with it."""
        return self._read[: self.count]

    def reduced(self, ids: DimIds) -> None:
        """These entries are summed or normalised over."""
        held = ids[self._unowned[ids]]
        if held.size:
            self.freeze(held, "is padding or a repeated entry that is reduced over")

    def join(self, left: DimIds, right: DimIds) -> None:
        """Entries that meet (after broadcasting) leave together."""
        if left is right:
            return
        if left.shape != right.shape:
            left, right = np.broadcast_arrays(left, right)
        left, right = left.ravel(), right.ravel()
        if left.size > 1 << 16:  # large arrays repeat few pairs
            left, right = np.divmod(np.unique(left * self.count + right), self.count)
        self.joins.append(Join(left, right, self.node))

    def freeze(self, ids: DimIds, reason: str) -> None:
        """These ids may not leave."""
        self.freezes.append(Freeze(ids.ravel(), reason, self.node))

    def freeze_all(self, axes: ValueIds, reason: str) -> None:
        for track in axes.values():
            self.freeze(track, reason)

    def balance(self, track: DimIds, dim: int) -> None:
        """Every row of `track` along `dim` keeps equally many entries."""
        matrix = np.moveaxis(track, dim, -1).reshape(-1, track.shape[dim])
        if not _ascending(matrix):
            matrix = np.unique(matrix, axis=0)
        key = (len(matrix), hashlib.blake2b(np.ascontiguousarray(matrix)).digest())
        if len(matrix) > 1 and matrix.shape[1] > 0 and key not in self._balanced:
            self._balanced.add(key)
            self.balances.append(Balance(matrix, self.node))

    def even(self, track: DimIds, dim: int) -> None:
        """`balance`, once for each track of a value, and only where it varies along other dims."""
        if track.size == track.shape[dim] or (id(track), dim) in self._even:
            return
        self._even[id(track), dim] = track  # kept alive, so that its id stays its own
        self.balance(track, dim)

    def share(self, own: DimIds, other: DimIds) -> None:
        """How many there are of the one is computed from how many there are of the other."""
        self.shares.append(Share(own.ravel(), other.ravel(), self.node))

    def collapse(self, track: DimIds, dim: int) -> DimIds:
        """Join the entries along `dim`, so that the track no longer varies along it; a free one, if any,
        stands for all.
        """
        if track.shape[dim] == 1:
            return track
        first = np.take(track, [0], axis=dim)
        self.join(track, first)
        free = self._unowned[track]
        return np.take_along_axis(track, free.argmax(axis=dim, keepdims=True), dim) if free.any() else first

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
            if _ascending(inner):  # no pair occurs twice
                known = self.new(inner.size)
                self.parts.append(Part(known, outer, inner, False, self.node))
            else:
                pairs, index = np.unique(np.stack([outer, inner]), axis=1, return_inverse=True)
                cells = self.new(pairs.shape[1])
                known = cells[index.ravel()]
                self.parts.append(Part(cells, pairs[0], pairs[1], False, self.node))
            self.mark_unowned(known[self._unowned[outer] | self._unowned[inner]])
            self._cells[key] = known
            self._factors[known.tobytes()] = outer, inner
        return known

    def split(self, track: DimIds, dims: Sequence[int]) -> ValueIds:
        """Tracks of the dims that one dim was cut into; `track` varies along several of `dims`, given from
        outer to inner.

        One dim: the track itself. Several: the innermost gets columns, the outer ones rows, recursively.

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
        dims = [d for d in dims if track.shape[d] > 1 and varies(track, d)]
        if not dims:
            return {}
        if len(dims) == 1:
            (dim,) = dims
            if any(track.shape[d] > 1 for d in range(track.ndim) if d != dim):
                self.balance(track, dim)
            return {dim: track}
        key = (track.tobytes(), (*track.shape, *dims))
        known = self._splits.get(key)
        if known is not None:
            return dict(known)
        factors = self._unmerged(track, dims)
        if factors is not None:
            return factors
        last = dims[-1]
        flat = np.moveaxis(track, last, -1)
        if _ascending(track):  # every id once: every row and every cell is its own
            row = np.moveaxis(self.new((*flat.shape[:-1], 1)), -1, last)
            column = self.new(track.shape)
        else:
            rows, row_index = np.unique(flat.reshape(-1, flat.shape[-1]), axis=0, return_inverse=True)
            row = np.moveaxis(self.new(len(rows))[row_index.ravel()].reshape(*flat.shape[:-1], 1), -1, last)
            cells, cell_index = np.unique(track, return_inverse=True)
            column = self.new(len(cells))[cell_index.ravel()].reshape(track.shape)
        full_row = np.broadcast_to(row, track.shape)
        for ids in (full_row, column):
            self.mark_unowned(ids[self._unowned[track]])
        self.parts.append(Part(track.ravel(), full_row.ravel(), column.ravel(), True, self.node))
        self.balance(column, last)
        axes = self.split(row, dims[:-1])
        axes[last] = column
        self._splits[key] = dict(axes)
        self._cells[b"".join((full_row.ravel().tobytes(), b"|", column.ravel().tobytes()))] = track.ravel()
        return axes

    def _spread(self, ids: DimIds, shape: tuple[int, ...]) -> DimIds:
        """Ids that are broadcast, in a row; of which factors they are made stays known."""
        wide = np.broadcast_to(ids, shape).ravel()
        factors = self._factors.get(ids.tobytes())
        if factors is not None and wide.size > ids.size:
            outer, inner = (self._spread(f.reshape(ids.shape), shape) for f in factors)
            self._factors[wide.tobytes()] = outer, inner
        return wide

    def _unmerged(self, track: DimIds, dims: Sequence[int]) -> ValueIds | None:
        """The tracks that a merged dim was made of, if each of them varies along one of the dims that it is
        cut into.
        """
        if track.size != np.prod([track.shape[d] for d in dims]):
            return None
        factors = self._factors_along(track, dims)
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
        """One track over `dims` (outer to inner, adjacent), full along those that matter; None if all of them
        are fixed.

        A track that varies along a dim inside its own is made constant along it: the order of what stays
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
            track = axes.get(dim)
            if track is None:
                continue
            for inner in dims[position + 1 :]:
                track = self.collapse(track, inner)
            if merged is None:
                merged = track
            else:
                full = np.broadcast_shapes(merged.shape, track.shape)
                merged = self.compose(merged, track).reshape(full)
        if merged is None:
            return None
        full = tuple(shape[d] if d in dims else merged.shape[d] for d in range(len(shape)))
        return np.broadcast_to(merged, full)


def _ascending(track: DimIds) -> bool:
    """Whether the ids rise from entry to entry, as fresh ones do: then each occurs once."""
    flat = track.ravel()
    return bool((flat[1:] > flat[:-1]).all())


def varies(track: DimIds, dim: int) -> bool:
    """Whether the ids differ from entry to entry along a dim."""
    first = np.take(track, [0], axis=dim)
    return bool((track != first).any())
