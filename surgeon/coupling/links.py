"""find_links(...) -> pairs of groups that must keep the same share, and groups that are pinned by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from surgeon.coupling.groups import Group
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.ops.ids import DimIds

Link = tuple[str, str]


def find_links(
    propagation: Propagation, solution: Solution, groups: Iterable[Group]
) -> tuple[list[tuple[str, str]], set[str]]:
    """Pairs of groups that must keep the same share, because the model's code computes one width from the
    other.

    Also the groups that must stay whole, because the other width is frozen.
    """
    group_of = np.full(len(solution.root), -1, dtype=np.int64)
    names = []
    grids: dict[int, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        group_of[group.sets.ravel()] = number
        names.append(group.name)
        if group.grid >= 0:
            grids[group.grid].append(number)
    of_grid = {number: members for members in grids.values() for number in members}

    def touched(ids: DimIds) -> set[int]:
        found: set[int] = set()
        for atoms in solution.atoms(ids):
            found |= set(group_of[atoms[atoms >= 0]].tolist()) - {-1}
        return {n for number in found for n in of_grid.get(number, [number])}

    is_slot = np.zeros(len(solution.root), dtype=bool)
    is_slot[solution.root[~propagation.constraints.is_unowned(np.arange(len(solution.root)))]] = True

    def fixed(ids: DimIds) -> bool:
        """Whether a dim is one of constants that stay, such as a batch that learned queries are repeated for."""
        classes = solution.root[ids]
        return bool(solution.frozen[classes].all()) and not bool(is_slot[classes].any())

    links, pinned = set(), set()
    for share in propagation.constraints.shares:
        own, other = share.own, share.other
        if own.size and other.size and own.size != other.size and (fixed(own) or fixed(other)):
            continue  # as of any fixed dim: of a multiple of it the other factor may leave
        if own.size == other.size and np.array_equal(solution.root[own], solution.root[other]):
            continue
        left, right = touched(own), touched(other)
        links |= {(min(a, b), max(a, b)) for a in left for b in right if a != b}
        if not left or not right or any(solution.frozen[solution.root[ids]].any() for ids in (own, other)):
            pinned |= left | right
    return [(names[a], names[b]) for a, b in sorted(links)], {names[i] for i in pinned}


def reachable(names: set[str], links: Iterable[tuple[str, str]]) -> set[str]:
    """The names and all that are linked to them, directly or not."""
    import networkx as nx

    graph = nx.Graph(links)
    found = set(names)
    for name in names & set(graph):
        found |= nx.node_connected_component(graph, name)
    return found
