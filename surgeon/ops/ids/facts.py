"""Facts: gives out ids, and collects what the rules of ops say of them."""

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


class Facts:
    """Gives out ids and writes down facts about them. `node` is the op whose rule writes."""

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
        self._met = np.zeros(1 << 10, dtype=bool)
        self.node: fx.Node | None = None
        self._balanced: set[tuple[int, bytes]] = set()
        self._even: dict[tuple[int, int], DimIds] = {}

    def new(self, shape: int | tuple[int, ...]) -> DimIds:
        """Fresh ids in an array of the given shape."""
        size = int(np.prod(shape))
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        if self.count > len(self._unowned):
            self._unowned, self._read, self._met = (
                np.concatenate([m, np.zeros(self.count, dtype=bool)])
                for m in (self._unowned, self._read, self._met)
            )
        return ids

    def mark_unowned(self, ids: DimIds) -> None:
        """Ids of padding and constants. No parameter owns them: each is removed with whatever it is joined to, and
        nothing shows which of them were.
        """
        self._unowned[ids] = True

    def is_unowned(self, ids: DimIds) -> DimIds:
        found: DimIds = self._unowned[ids]
        return found

    def value(self, axes: ValueIds) -> None:
        """An op gives a value with these ids."""
        self.dims |= {id(dim_ids): dim_ids for dim_ids in axes.values() if dim_ids.size}

    def read(self, axes: ValueIds) -> None:
        """An op computes with these entries."""
        for dim_ids in axes.values():
            self._read[dim_ids] = True

    @property
    def is_read(self) -> DimIds:
        """id -> whether an op computes with it."""
        return self._read[: self.count]

    def reduced(self, ids: DimIds) -> None:
        """These entries are summed or normalised over."""
        held = ids[self._unowned[ids]]
        if held.size:
            self.freeze(held, "is padding or a repeated entry that is reduced over")

    def met(self, ids: DimIds, operand_ids: Sequence[DimIds]) -> None:
        """These entries lie beside others that leave with them: where one of those is a tensor's, they are no
        longer loose.
        """
        tied = np.zeros(
            np.broadcast_shapes(ids.shape, *(dim_ids.shape for dim_ids in operand_ids)), dtype=bool
        )
        for dim_ids in operand_ids:
            tied |= ~self._unowned[dim_ids] | self._met[dim_ids]
        self._met[np.broadcast_to(ids, tied.shape)[tied]] = True

    def carried(self, ids: DimIds) -> None:
        """A product gives a value with these entries along a dim that it does not sum over: what unowned entries
        became there is no constant any more, and nothing would show which of them left.
        """
        loose = ids[self._unowned[ids] & ~self._met[ids]]
        if loose.size:
            self.freeze(loose, "is padding or a repeated entry that a product mixes with others")

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
        for dim_ids in axes.values():
            self.freeze(dim_ids, reason)

    def balance(self, dim_ids: DimIds, dim: int) -> None:
        """Every row of `dim_ids` along `dim` keeps equally many entries."""
        matrix = np.moveaxis(dim_ids, dim, -1).reshape(-1, dim_ids.shape[dim])
        if not ascending(matrix):
            matrix = np.unique(matrix, axis=0)
        key = (len(matrix), hashlib.blake2b(np.ascontiguousarray(matrix)).digest())
        if len(matrix) > 1 and matrix.shape[1] > 0 and key not in self._balanced:
            self._balanced.add(key)
            self.balances.append(Balance(matrix, self.node))

    def even(self, dim_ids: DimIds, dim: int) -> None:
        """`balance`, once for the ids of each dim of a value, and only where they vary along other dims."""
        if dim_ids.size == dim_ids.shape[dim] or (id(dim_ids), dim) in self._even:
            return
        self._even[id(dim_ids), dim] = dim_ids  # kept alive, so that its id stays its own
        self.balance(dim_ids, dim)

    def share(self, own: DimIds, other: DimIds) -> None:
        """How many there are of the one is computed from how many there are of the other."""
        self.shares.append(Share(own.ravel(), other.ravel(), self.node))

    def collapse(self, dim_ids: DimIds, dim: int) -> DimIds:
        """Join the entries along `dim`, so that the ids no longer vary along it; an unowned one, if any,
        stands for all.
        """
        if dim_ids.shape[dim] == 1:
            return dim_ids
        first = np.take(dim_ids, [0], axis=dim)
        self.join(dim_ids, first)
        free = self._unowned[dim_ids]
        if not free.any():
            return first
        found = np.take_along_axis(dim_ids, free.argmax(axis=dim, keepdims=True), dim)
        self.met(found, [dim_ids])
        return found


def ascending(dim_ids: DimIds) -> bool:
    """Whether the ids rise from entry to entry, as fresh ones do: then each occurs once."""
    flat = dim_ids.ravel()
    return bool((flat[1:] > flat[:-1]).all())


def varies(dim_ids: DimIds, dim: int) -> bool:
    """Whether the ids differ from entry to entry along a dim."""
    first = np.take(dim_ids, [0], axis=dim)
    return bool((dim_ids != first).any())
