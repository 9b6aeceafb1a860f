"""linked_groups(...) -> groups that shrink together in steps, with the counts at which their widths are legal.

*Linked groups* are usually one group, several where the model's code ties their sizes (links: all keep the same
share). Of a grid only rows or only columns are taken, whichever meets the ratio more closely (rows when
equal, if some op computes them one by one and more than one stays: whole heads and groups are what kernels
like). At least one step of each stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link, reachable
from surgeon.ops.ids import DimIds
from surgeon.selection.amounts import of_pattern
from surgeon.selection.cost import Choice
from surgeon.selection.options import HEADS
from surgeon.selection.request import Request


@dataclasses.dataclass
class LinkedGroups:
    """Groups that move together: step j removes `per[i]` steps of group i.

    `order[i]` is [sets, steps] of group i's atoms, first to leave first; `score` is one number per step of
    all. At least `kept` steps stay. `blocks[i]` is what the kept width of group i is a multiple of, and
    `gives` says whether less will do where nothing else fits, but never less than `needed[i]`, which a kernel
    asks for; `flexible` blocks may be halved to meet a ratio more closely. `ratio` is the share asked of
    them, if one was. `additive` scores add up over all of them to what is lost.
    """

    groups: list[Group]
    per: list[int]
    order: list[DimIds]
    score: DimIds
    kept: int = 1
    blocks: Sequence[int] = (1,)
    gives: bool = False
    flexible: bool = False
    ratio: float | None = None
    additive: bool = False
    needed: Sequence[int] = ()
    _legal: DimIds | None = None

    @property
    def steps(self) -> int:
        """How many steps the groups have; each step takes equally many units of every group."""
        return len(self.score)

    @property
    def width(self) -> float:
        """Channels of the first group that one step takes."""
        return self.groups[0].width / self.steps

    @cached_property
    def slots(self) -> int:
        """How many slots its channels take an index of: a residual stream has some of every layer on it."""
        return len({(member.tensor, member.dim) for group in self.groups for member in group.members})

    def remove(self, choice: Choice, steps: int) -> None:
        """Mark the units of the first `steps` steps as removed."""
        for order, per in zip(self.order, self.per, strict=True):
            choice[order[:, : steps * per].ravel()] = True

    def give_back(self, choice: Choice) -> None:
        """Mark all of its units as kept."""
        for order in self.order:
            choice[order.ravel()] = False

    def legal(self) -> DimIds:
        """Counts of steps that may leave, ascending: those that leave whole blocks of every group, and 0.

        Where groups that move together have no such count in common, or steps are of another size
        (heads), the blocks are halved until there is one.
        """
        if self._legal is None:
            shrunk = 1
            self._legal = self._whole_blocks(shrunk)
            together = len(self.groups) > 1 or any(group.width > group.steps for group in self.groups)
            while together and self.gives and shrunk < max(self.blocks) and len(self._legal) == 1:
                shrunk *= 2
                self._legal = self._whole_blocks(shrunk)
        return self._legal

    def _whole_blocks(self, shrunk: int) -> DimIds:
        counts = np.arange(max(self.steps - self.kept, 0) + 1)
        fits = np.ones(len(counts), dtype=bool)
        for group, block, needed in zip(
            self.groups, self.blocks, self.needed or [1] * len(self.blocks), strict=True
        ):
            whole = math.lcm(max(1, block // shrunk), needed)
            if whole > 1:
                fits &= (self.steps - counts) * group.width % (whole * self.steps) == 0
        fits[0] = True
        return counts[fits]

    def nearest(self, target: float) -> int:
        """The legal count nearest to `target`, the larger one if two are."""
        counts = self.legal()[::-1]
        return int(counts[np.argmin(np.abs(counts - target))])

    def closest(self, share: float, within: float) -> int:
        """The count that leaves the nearest share, in blocks that are halved until that is as close as `within`.

        Blocks are halved for "auto" alone. What must stay is not asked for.
        """
        wanted = min(share * self.steps, self.steps - self.kept)
        shrunk, count = 1, self.nearest(share * self.steps)
        while self.flexible and abs(count - wanted) > within * self.steps and shrunk < max(self.blocks):
            shrunk *= 2
            counts = self._whole_blocks(shrunk)[::-1]
            count = int(counts[np.argmin(np.abs(counts - wanted))])
        return count

    def fewer(self, count: int) -> int | None:
        """The next smaller legal count."""
        below = self.legal()[self.legal() < count]
        return int(below[-1]) if below.size else None


def without_kept_heads(groups: list[Group], heads: str, links: list[Link]) -> list[Group]:
    """The groups less the parts of attention that are to stay, and less those whose widths the code computes
    from them.
    """
    kept = {group.name for group in groups if group.attention in HEADS[heads]}
    movable = {group.grid for group in groups if group.name not in kept and group.grid >= 0}
    still = {group.name for group in groups if group.name in kept and group.grid not in movable}
    kept |= reachable(still, links)
    return [group for group in groups if group.name not in kept]


def sides(groups: list[Group], ratio: Callable[[Group], float]) -> list[Group]:
    """All plain groups, and of each grid its rows or its columns; `ratio` is what a group is to lose."""
    grids: dict[int, dict[str, list[Group]]] = defaultdict(lambda: {"rows": [], "middle": [], "columns": []})
    for group in groups:
        if group.kind != "channels":
            grids[group.grid][group.kind].append(group)
    drop: set[str] = set()
    for parts in grids.values():
        outer = parts["rows"] or parts["middle"]
        inner = [g for g in parts["middle"] + parts["columns"] if g not in outer]
        if not outer or not inner:
            continue
        several = all(
            g.steps - round(ratio(g) * g.steps) > 1 for g in outer
        )  # code treats dims of size 1 differently
        whole = (
            several and any(g.batched for g in outer) and _miss(outer, ratio) <= _miss(inner, ratio) + 1e-9
        )
        if parts["middle"]:  # grids within grids: what the rows lose, all of them lose
            whole = True
        drop |= {g.name for g in (inner if whole else outer)}
    return [g for g in groups if g.name not in drop]


def _miss(side: list[Group], ratio: Callable[[Group], float]) -> float:
    """How far a side of a grid stays from its ratio, at most."""
    asked = [(g.steps, ratio(g)) for g in side]
    return max(abs(min(round(share * steps), steps - 1) / steps - share) for steps, share in asked)


def build(
    chosen: list[Group],
    links: Iterable[Link],
    score: Callable[[Group], DimIds],
    request: Request,
    block_of: Callable[[Group], tuple[int, int]],
    additive: bool = False,
) -> list[LinkedGroups]:
    """These groups, those that are linked together."""
    import networkx as nx

    tied = nx.Graph()
    tied.add_nodes_from(range(len(chosen)))
    place = {group.name: i for i, group in enumerate(chosen)}
    tied.add_edges_from((place[a], place[b]) for a, b in links if a in place and b in place)
    parts = [[chosen[i] for i in sorted(found)] for found in nx.connected_components(tied)]
    return [_band(groups, score, request, block_of, additive) for groups in parts]


def _band(
    groups: list[Group],
    score: Callable[[Group], DimIds],
    request: Request,
    block_of: Callable[[Group], tuple[int, int]],
    additive: bool,
) -> LinkedGroups:
    steps = math.gcd(*[g.steps for g in groups])
    per = [g.steps // steps for g in groups]
    order, total = [], np.zeros(steps)
    for group, count in zip(groups, per, strict=True):
        found = score(group)
        rank = np.stack([_ranked(*one_set) for one_set in zip(found, group.strata, strict=True)])
        order.append(np.take_along_axis(group.sets, rank, axis=1))
        ranked = np.take_along_axis(found, rank, axis=1)
        if additive:
            total += ranked.sum(axis=0).reshape(steps, count).sum(axis=1)
        else:
            total += ranked.mean(axis=0).reshape(steps, count).mean(axis=1) / len(groups)
    strata = max(
        max(len(np.unique(one_set)) for one_set in group.strata) / count
        for group, count in zip(groups, per, strict=True)
    )
    caps = [of_pattern(request.options["max_ratio"], group.producers, 1.0) for group in groups]
    floor = max(min(1.0, request.options["min_channels"] / group.width) for group in groups)
    kept = max(strata, steps * (1 - min(caps)) - 1e-9, steps * floor - 1e-9)
    ratio = None
    if not isinstance(request.ratio, float | int | None):
        ratio = min(of_pattern(request.ratio, group.producers, 0.0) for group in groups)
    blocks, needed = zip(*map(block_of, groups), strict=True)
    return LinkedGroups(
        groups,
        per,
        order,
        total,
        math.ceil(kept),
        blocks,
        isinstance(request.options["round_to"], str),
        request.options["round_to"] == "auto",
        ratio,
        additive,
        needed,
    )


def narrowed(block: int, width: int) -> int:
    """The block, halved until a group of this width holds two."""
    while block > 1 and width < 2 * block:
        block //= 2
    return block


def _ranked(scores: DimIds, strata: DimIds) -> DimIds:
    """Order of a balanced set's units, first to leave first.

    Units that touch other slots form strata; each loses the same share, and the best unit of each comes last,
    so that no slot is ever emptied.
    """
    order = np.argsort(scores, kind="stable")
    if (strata == strata[0]).all():
        return order
    place = np.empty(len(scores))
    for stratum in np.unique(strata):
        own = order[strata[order] == stratum]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
        place[own[-1]] = 2
    return np.argsort(place, kind="stable")
