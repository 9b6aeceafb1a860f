"""Recorded runs of a model -> `Analysis`: all that coupling found, as plain data for the stages after it."""

from __future__ import annotations

import dataclasses

from surgeon.coupling.frozen import FrozenGroup, find_frozen
from surgeon.coupling.groups import Group, find_groups
from surgeon.coupling.links import Link, find_links, reachable
from surgeon.coupling.propagate import Propagation, propagate
from surgeon.coupling.solution import Solution
from surgeon.coupling.solve import solve
from surgeon.graph.graph import Graph

SIZE_OF_FROZEN = "the model's code computes its size from one that is frozen"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What coupling found.

    Attributes:
        runs: the recorded runs; the first one is in eval mode.
        propagation: the ids of every value, and the facts about them.
        solution: what follows from these facts.
        groups: the units that may be removed.
        links: pairs of groups that must keep the same share.
        frozen: what may not be removed, with reasons.
    """

    runs: tuple[Graph, ...]
    propagation: Propagation
    solution: Solution
    groups: tuple[Group, ...]
    links: tuple[Link, ...]
    frozen: tuple[FrozenGroup, ...]

    @property
    def graph(self) -> Graph:
        """The run that a user's model will repeat: the first one."""
        return self.runs[0]


def analyse(*runs: Graph) -> Analysis:
    """Find groups, links and what is frozen.

    Args:
        runs: recorded runs of one model, at least one.
    """
    propagation = propagate(*runs)
    solution = solve(propagation.constraints)
    groups, stuck = find_groups(propagation, solution)
    links, pinned = find_links(propagation, solution, groups)
    pinned = reachable(pinned, links)
    fixed = [FrozenGroup(g.slots, g.width, SIZE_OF_FROZEN, None) for g in groups if g.name in pinned]
    return Analysis(
        runs=runs,
        propagation=propagation,
        solution=solution,
        groups=tuple(g for g in groups if g.name not in pinned),
        links=tuple(links),
        frozen=(*find_frozen(propagation, solution), *stuck, *fixed),
    )
