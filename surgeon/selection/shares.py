"""missed(...) -> groups that lose another share of their channels than was asked for, to be said in the plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.selection.amounts import of_pattern
from surgeon.selection.cost import Choice
from surgeon.selection.linked_groups import sides, without_kept_heads
from surgeon.selection.request import Request

CLOSE = 0.1  # shares that differ by no more than this are what was asked for


def missed(
    groups: list[Group], links: Iterable[Link], request: Request, choice: Choice
) -> list[dict[str, Any]]:
    """Of a ratio for every group, those that it was missed in by more than `CLOSE`: group, its width, the shares that
    were asked for (under `max_ratio`) and reached.
    """
    if request.ratio is None or request.scope != "uniform":
        return []
    ratio, cap = request.ratio, request.options["max_ratio"]

    def asked(group: Group) -> float:
        return min(of_pattern(ratio, group.producers, 0.0), of_pattern(cap, group.producers, 1.0))

    found = []
    for group in sides(without_kept_heads(groups, request.options["heads"], list(links)), asked):
        reached = float(choice[group.sets].mean())
        if abs(reached - asked(group)) > CLOSE:
            found.append(
                {"group": group.name, "width": group.width, "asked": asked(group), "reached": reached}
            )
    return found
