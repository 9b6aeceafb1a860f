"""Graph -> what must be removed together: groups, links between them, and what is frozen, with reasons."""

from surgeon.coupling.frozen import FrozenGroup, find_frozen
from surgeon.coupling.groups import Group, Member, find_groups
from surgeon.coupling.links import Link, find_links
from surgeon.coupling.propagate import Propagation, Slot, propagate
from surgeon.coupling.solution import Solution
from surgeon.coupling.solve import solve

__all__ = [
    "FrozenGroup",
    "Group",
    "Link",
    "Member",
    "Propagation",
    "Slot",
    "Solution",
    "find_frozen",
    "find_groups",
    "find_links",
    "propagate",
    "solve",
]
