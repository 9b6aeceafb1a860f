"""What leaves: fewer units where those of one group would together take all indices of a slot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from surgeon.coupling.groups import Group, Member
from surgeon.selection.linked_groups import LinkedGroups
from surgeon.selection.planner import Planner, State


def planner_of(slot: np.ndarray) -> Any:
    """A planner whose one slot loses an index with either of two units, four places apart."""
    shapes = SimpleNamespace(
        solution=SimpleNamespace(root=np.arange(8)),
        propagation=SimpleNamespace(slots={("w", 0): slot}),
        leaves=lambda ids, choice: choice[ids] | choice[ids + 4],
    )
    planner: Any = Planner.__new__(Planner)
    planner.shapes, planner._slots, planner._last, planner._apart = shapes, {}, None, None
    return planner


def test_two_sets_that_share_a_slot_leave_something_of_it() -> None:
    sets, slot = np.arange(8).reshape(2, 4), np.arange(4)
    group = Group("g", sets, [Member("w", 0, np.tile(slot, 2), np.arange(8))], np.zeros_like(sets))
    order = np.array([[0, 1, 2, 3], [6, 7, 4, 5]])  # two of each set would take all four indices
    linked = LinkedGroups([group], [1], [order], np.arange(4.0))
    planner = planner_of(slot)
    assert np.flatnonzero(planner.choice(State([linked], [2]))).tolist() == [0, 6]
    order[1] = order[1][[2, 3, 0, 1]]  # the same indices
    assert np.flatnonzero(planner.choice(State([linked], [2]))).tolist() == [0, 1, 4, 5]
