"""Planner: the linked groups of a model in the blocks that a request asks for, and what leaves at a share."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.ops.ids import DimIds
from surgeon.selection.amounts import of_pattern
from surgeon.selection.cost import Choice, ShapeModel, needed_blocks, nothing
from surgeon.selection.linked_groups import LinkedGroups, build, narrowed, sides
from surgeon.selection.ranking import Ranking
from surgeon.selection.request import Request
from surgeon.selection.shares import CLOSE


@dataclasses.dataclass
class State:
    """How many steps each of the linked groups loses."""

    linked_groups: list[LinkedGroups]
    counts: list[int]


class Planner:
    def __init__(
        self,
        groups: list[Group],
        scores: Callable[[Group], DimIds],
        shapes: ShapeModel,
        request: Request,
        links: list[Link],
        block: int,
        additive: bool,
    ) -> None:
        self.groups, self.shapes, self.request, self.links, self.block = groups, shapes, request, links, block
        self.score, self.additive = scores, additive
        self.narrow = False  # whether groups of convolutions that hold one block may keep a part of it
        self._known: dict[tuple[str, ...], list[LinkedGroups]] = {}
        self._slots: dict[str, list[DimIds]] = {}
        self._last: tuple[State, Choice] | None = None
        self._apart: tuple[list[LinkedGroups], bool] | None = None
        self._ranked: dict[
            tuple[int, ...], tuple[list[LinkedGroups], Ranking]
        ] = {}  # by ids; they stay alive
        self._needed = needed_blocks(shapes.graph)

    def linked_groups(self, ratio: float) -> list[LinkedGroups]:
        asked = self.request.ratio if isinstance(self.request.ratio, Mapping) else ratio
        chosen = sides(self.groups, lambda group: of_pattern(asked, group.producers, 0.0))
        key = tuple(group.name for group in chosen)
        if key not in self._known:
            found = self._built(chosen, self._block)
            if isinstance(self.request.options["round_to"], str) and all(
                len(linked.legal()) == 1 for linked in found
            ):
                found = self._built(chosen, self._narrowed)
            self._known[key] = found
        return self._known[key]

    def _built(self, groups: list[Group], block: Callable[[Group], int]) -> list[LinkedGroups]:
        def whole(group: Group) -> tuple[int, int]:
            sizes = [
                (self._needed.get((m.tensor, m.dim), 1) * group.width, len(m.index)) for m in group.members
            ]
            needed = [size // math.gcd(size, own) for size, own in sizes if size > group.width]
            return block(group), math.lcm(*needed)

        return build(groups, self.links, self.score, self.request, whole, self.additive)

    def _narrowed(self, group: Group) -> int:
        return narrowed(self.block, group.width)

    def _block(self, group: Group) -> int:
        """What the group's width is a multiple of.

        Convolutions pad narrower widths to a whole block, and leave their fast path behind one, so that a
        part of a block saves nothing; matrix products do not, so that narrow groups may keep less. If nothing
        could leave a model otherwise, all may.
        """
        tensors = self.shapes.graph.tensors
        if not isinstance(self.request.options["round_to"], str):
            return self.block
        if self.narrow:
            return self._narrowed(group)
        convolved = any(tensors[member.tensor].dim() > 2 for member in group.members)
        return self.block if convolved and group.width >= self.block else narrowed(self.block, group.width)

    def relaxed(self) -> bool:
        """Whether smaller parts of groups may leave now than before; never where the user named the block."""
        if self.request.options["round_to"] != "auto" or (self.narrow and self.block == 1):
            return False
        if self.narrow:
            self.block //= 2
        self.narrow = True
        self._known.clear()
        return True

    def at(
        self, ratio: float, scope: str | None = None, linked_groups: list[LinkedGroups] | None = None
    ) -> State:
        """What leaves at this share of channels."""
        linked_groups = self.linked_groups(ratio) if linked_groups is None else linked_groups
        scope = scope or self.request.scope
        counts = [0] * len(linked_groups)
        if scope == "uniform" and self.request.ratio is not None:
            counts = [
                linked.closest(ratio if linked.ratio is None else linked.ratio, CLOSE)
                for linked in linked_groups
            ]
        elif scope == "uniform":
            counts = [linked.nearest(ratio * linked.steps) for linked in linked_groups]
        else:
            pools: dict[Hashable, list[int]] = defaultdict(list)
            for number, linked in enumerate(linked_groups):
                pools[_structure(linked) if scope == "isomorphic" else ""].append(number)
            for pool in pools.values():
                for number, count in zip(pool, self._ranking(linked_groups, pool).lowest(ratio), strict=True):
                    counts[number] = linked_groups[number].nearest(count)
        return State(linked_groups, counts)

    def _ranking(self, linked_groups: list[LinkedGroups], pool: list[int]) -> Ranking:
        """Of some of the linked groups; a search asks for the same ones again and again."""
        found = [linked_groups[number] for number in pool]
        key = tuple(map(id, found))
        if key not in self._ranked:
            self._ranked[key] = found, Ranking(found)
        return self._ranked[key][1]

    def choice(self, state: State) -> Choice:
        """The units that leave; fewer where units of one group would together take all indices of a slot."""
        last, linked_groups = self._last, state.linked_groups
        if last is not None and last[0].linked_groups is linked_groups and self._independent(linked_groups):
            choice = last[1].copy()
            for linked, count, before in zip(linked_groups, state.counts, last[0].counts, strict=True):
                if count != before:
                    linked.give_back(choice)
                    linked.remove(choice, count)
        else:
            choice = self._whole_choice(state)
        self._last = State(linked_groups, list(state.counts)), choice
        return choice

    def _independent(self, linked_groups: list[LinkedGroups]) -> bool:
        """Whether no index of a slot is held by two units, so that each of them leaves as if it were alone."""
        if self._apart is None or self._apart[0] is not linked_groups:
            shared = any(self._shared(group) for linked in linked_groups for group in linked.groups)
            self._apart = linked_groups, not shared
        return self._apart[1]

    def _whole_choice(self, state: State) -> Choice:
        choice = nothing(self.shapes.solution)
        for linked, count in zip(state.linked_groups, state.counts, strict=True):
            linked.remove(choice, count)
            while count and any(self._empties(choice, group) for group in linked.groups):
                linked.give_back(choice)
                count = linked.fewer(count) or 0
                linked.remove(choice, count)
        return choice

    def _empties(self, choice: Choice, group: Group) -> bool:
        return any(self.shapes.leaves(slot, choice).all() for slot in self._shared(group))

    def _shared(self, group: Group) -> list[DimIds]:
        """The slots with an index that two units hold: it leaves with either."""
        if group.name not in self._slots:
            slots = self.shapes.propagation.slots
            found = [m for m in group.members if len(m.index) > int(m.index.max()) + 1]
            self._slots[group.name] = [slots[member.tensor, member.dim] for member in found]
        return self._slots[group.name]


def _structure(linked: LinkedGroups) -> Hashable:
    """What groups of like structure have in common: the kinds of slots that they touch, and how often (Fang
    et al., 2024).
    """
    return tuple(
        (
            group.kind,
            group.attention,
            tuple(sorted(Counter((m.tensor.rpartition(".")[2], m.dim) for m in group.members).items())),
        )
        for group in linked.groups
    )
