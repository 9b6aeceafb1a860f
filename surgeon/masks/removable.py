"""removable(found, carries) -> the choice of all units that carry no signal, as far as what leaves with what allows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.cut.inspected import Inspected
from surgeon.ops.ids import DimIds
from surgeon.selection.cost import Choice, nothing
from surgeon.selection.planner import Planner, State
from surgeon.selection.request import Request


def removable(found: Inspected, carries: DimIds, more: Sequence[Link] = ()) -> Choice:
    """Which units leave: steps of which no unit carries a signal. One step of each group stays.

    Args:
        carries: class -> whether its removal would change what the model computes.
        more: pairs of groups that keep the same share, beside those that are known.
    """

    def scores(group: Group) -> DimIds:
        found: DimIds = carries[group.sets].astype(float)
        return found

    groups = _sides(list(found.groups), scores)
    if not groups:
        return nothing(found.solution)
    request = Request.of(0.5, round_to=1)
    planner = Planner(groups, scores, found.shapes, request, [*found.links, *more], 1, False)
    linked_groups = planner.linked_groups(0.5)
    counts = []
    for linked in linked_groups:
        silent = int(np.argmax(linked.score > 0)) if (linked.score > 0).any() else linked.steps
        legal = linked.legal()
        counts.append(int(legal[legal <= silent][-1]))
    return planner.choice(State(linked_groups, counts))


def _sides(groups: Sequence[Group], scores: Callable[[Group], DimIds]) -> list[Group]:
    """All plain groups, and of each grid its rows or its columns: those that lose the larger share."""
    grids: dict[int, dict[str, list[Group]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        if group.kind != "channels":
            grids[group.grid]["columns" if group.kind == "columns" else "rows"].append(group)
    drop: set[str] = set()
    for sides in grids.values():
        shares = {
            side: min((_silent_share(group, scores) for group in found), default=0.0)
            for side, found in sides.items()
        }
        better = max(("rows", "columns"), key=lambda side: shares.get(side, 0.0))
        drop |= {group.name for side, found in sides.items() if side != better for group in found}
    return [group for group in groups if group.name not in drop]


def _silent_share(group: Group, scores: Callable[[Group], DimIds]) -> float:
    """The share of a group's steps that carry no signal."""
    silent: float = (scores(group) == 0).sum(axis=1).min() / group.steps
    return silent
