"""What may not be removed, with reasons."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from torch import fx

from surgeon.coupling.propagate import Propagation, Slot
from surgeon.coupling.solution import Solution
from surgeon.ops.ids import DimIds


@dataclasses.dataclass(frozen=True)
class FrozenGroup:
    """Indices of slots that may not leave, and why."""

    slots: tuple[Slot, ...]
    count: int
    reason: str
    node: fx.Node | None


def _stuck(groups_of: DimIds, atoms: DimIds, slot_of: DimIds, slots: list[Slot]) -> list[FrozenGroup]:
    """Units that are not frozen, but of which no combination leaves every balance even."""
    alone = groups_of[atoms] < 0
    if not alone.any():
        return []
    touched = tuple(slots[i] for i in np.unique(slot_of[alone]).tolist())
    reason = "parts of one tensor must keep equally many, and no small combination of these units does"
    return [FrozenGroup(touched, int(np.unique(atoms[alone]).size), reason, None)]


def find_frozen(propagation: Propagation, solution: Solution) -> list[FrozenGroup]:
    """Slots with frozen indices, those of one class set together, with a reason."""
    found: dict[tuple[str, int, int], FrozenGroup] = {}
    by_key: dict[tuple[int, bytes], list[Slot]] = defaultdict(list)
    ids_of: dict[tuple[int, bytes], DimIds] = {}
    for slot, ids in propagation.slots.items():
        roots = solution.root[ids]
        stuck = roots[solution.frozen[roots]]
        if stuck.size:
            key = (stuck.size, stuck.tobytes())
            by_key[key].append(slot)
            ids_of[key] = stuck
    for number, (key, slots) in enumerate(by_key.items()):
        reason, node = solution.why(ids_of[key])
        found[reason, key[0], number] = FrozenGroup(tuple(slots), key[0], reason, node)
    return list(found.values())
