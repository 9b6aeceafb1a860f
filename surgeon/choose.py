"""choose(...) -> Choice: which units leave, from scores and a ratio or budget.

Groups are gathered into *bands* that move in steps: usually one group, several where the model's code ties their sizes
(`links`: all keep the same share). Of a grid only rows or only columns are taken, whichever meets the ratio more closely (rows
when equal, if some op computes them one by one and more than one stays: whole heads and groups are what kernels like). At least
one step of every band stays.

Scopes: `uniform` removes the same share of every band; `global` removes the lowest scores wherever they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import networkx as nx
import numpy as np

from surgeon.cost import Choice, Shapes, nothing
from surgeon.errors import BudgetError, InputError
from surgeon.groups import Group, reachable
from surgeon.labels import Track

SCOPES = ("uniform", "global")
HEADS = {"both": (), "whole": ("head dims",), "dims": ("heads",), "keep": ("heads", "head dims")}  # what may not leave


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: exactly one of ratio, macs and params is set.

    Attributes:
        ratio: share of channels to remove from every group, in [0, 1).
        macs, params: a share of the original (a float up to 1) or an absolute number (above 1).
        scope: "uniform" or "global".
        round_to: kept widths are multiples of this where a group is wide enough.
        heads: what attention may lose: "both" (whole heads or dims within heads, whichever meets the ratio more closely),
            "whole", "dims", or "keep" for nothing.
    """

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    scope: str = "uniform"
    round_to: int = 1
    heads: str = "both"

    def __post_init__(self) -> None:
        asked = [name for name in ("ratio", "macs", "params") if getattr(self, name) is not None]
        if len(asked) != 1:
            raise InputError(
                f"got {' and '.join(asked)} together" if asked else "got neither a ratio nor a budget",
                fix="pass exactly one of ratio, macs=... and params=...",
            )
        for name in asked:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value!r}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise InputError(
                f"ratio {self.ratio} is outside [0, 1)",
                why="it is the share of channels to remove: 0 removes nothing, 0.5 every second channel",
                fix="pass a ratio such as 0.5",
            )
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} budget {value} must be positive", fix=f"pass a share such as {name}=0.5 or a number")
        if self.scope not in SCOPES:
            raise InputError(f"unknown scope {self.scope!r}", fix=f"use one of {', '.join(SCOPES)}")
        if self.heads not in HEADS:
            raise InputError(f"unknown heads {self.heads!r}", fix=f"use one of {', '.join(HEADS)}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise InputError(f"round_to must be a positive whole number, got {self.round_to!r}")


@dataclasses.dataclass
class Band:
    """Groups that move together: step j removes `per[i]` steps of group i.

    `order[i]` is [lanes, steps] of group i's atoms, first to leave first; `score` is one number per step of the band. At least
    `kept` steps stay.
    """

    groups: list[Group]
    per: list[int]
    order: list[Track]
    score: Track
    width: float
    kept: int = 1

    @property
    def steps(self) -> int:
        return len(self.score)

    def remove(self, choice: Choice, steps: int) -> None:
        for order, per in zip(self.order, self.per, strict=True):
            choice[order[:, : steps * per].ravel()] = True

    def give_back(self, choice: Choice) -> None:
        for order in self.order:
            choice[order.ravel()] = False

    def legal(self, target: float, round_to: int) -> int:
        """Steps to remove, as near to `target` as keeping at least one step and whole blocks of `round_to` allows."""
        most = max(self.steps - self.kept, 0)
        removed = min(max(round(target), 0), most)
        if round_to == 1:
            return removed
        counts = [k for k in range(most + 1) if (self.steps - k) * self.width % round_to == 0]
        return min(counts, key=lambda k: (abs(k - target), -k)) if counts else 0


Scores = Mapping[str, Track]
Link = tuple[str, str]


def choose(
    groups: list[Group],
    scores: Callable[[Group], Track],
    shapes: Shapes,
    request: Request,
    links: Iterable[Link] = (),
) -> Choice:
    """The choice that meets the request.

    Raises:
        BudgetError: there is nothing to remove, or the budget lies below what must stay.
    """
    links = list(links)
    groups = without_kept_heads(groups, request.heads, links)
    if not groups:
        raise BudgetError(
            "the model has no group of channels that may leave",
            why="everything that was found is frozen",
            fix="print(surgeon.inspect(model)) names each frozen tensor and the reason",
        )
    planner = _Planner(groups, scores, shapes, request, links)
    if request.ratio is not None:
        return planner.at(request.ratio)
    kind = "macs" if request.macs is not None else "params"
    return planner.within(kind, request.macs if request.macs is not None else request.params)  # type: ignore[arg-type]  # one is set


def without_kept_heads(groups: list[Group], heads: str, links: list[Link]) -> list[Group]:
    """The groups less the parts of attention that are to stay, and less those whose widths the code computes from them."""
    kept = {group.name for group in groups if group.attention in HEADS[heads]}
    movable = {group.grid for group in groups if group.name not in kept and group.grid >= 0}
    still = {group.name for group in groups if group.name in kept and group.grid not in movable}
    kept |= reachable(still, links)
    return [group for group in groups if group.name not in kept]


class _Planner:
    def __init__(
        self, groups: list[Group], scores: Callable[[Group], Track], shapes: Shapes, request: Request, links: list[Link]
    ) -> None:
        self.groups, self.shapes, self.request, self.links = groups, shapes, request, links
        self._scores = scores
        self._known: dict[str, Track] = {}
        self._bands: dict[tuple[str, ...], list[Band]] = {}

    def score(self, group: Group) -> Track:
        if group.name not in self._known:
            self._known[group.name] = self._scores(group)
        return self._known[group.name]

    def at(self, ratio: float) -> Choice:
        """The choice that removes this share of channels."""
        choice = nothing(self.shapes.solution)
        bands = self.bands(ratio)
        if self.request.scope == "uniform":
            for band in bands:
                self._take(choice, band, band.legal(ratio * band.steps, self.request.round_to))
            return choice
        total = sum(band.width * band.steps for band in bands)
        entries = sorted(
            (
                (float(s), i)
                for i, band in enumerate(bands)
                for s in np.maximum.accumulate(band.score)[: max(band.steps - band.kept, 0)]
            ),
            key=lambda e: e[0],
        )
        counts: dict[int, int] = defaultdict(int)
        gone = 0.0
        for _, i in entries:
            if gone + bands[i].width / 2 > ratio * total:
                break
            counts[i] += 1
            gone += bands[i].width
        for i, count in counts.items():
            self._take(choice, bands[i], bands[i].legal(count, self.request.round_to))
        return choice

    def _take(self, choice: Choice, band: Band, steps: int) -> None:
        """Remove so many steps of a band, fewer where units of one group would together take all indices of a slot."""
        band.remove(choice, steps)
        while steps and any(self._empties(choice, group) for group in band.groups):
            band.give_back(choice)
            steps -= 1
            band.remove(choice, steps)

    def _empties(self, choice: Choice, group: Group) -> bool:
        for member in group.members:
            if len(member.index) > int(member.index.max()) + 1:  # an index that two units hold: it leaves with either
                slot = self.shapes.propagation.slots[member.tensor, member.dim]
                if self.shapes.leaves(slot, choice).all():
                    return True
        return False

    def within(self, kind: str, budget: float) -> Choice:
        """The choice that removes least and costs no more than the budget."""
        cost = self.shapes.macs if kind == "macs" else self.shapes.params
        full = cost(nothing(self.shapes.solution))
        limit = budget * full if budget <= 1 else budget
        if full <= limit:
            return nothing(self.shapes.solution)
        low, high = 0.0, 1.0
        best = self.at(math.nextafter(1.0, 0.0))
        floor = cost(best)
        if floor > limit:
            raise BudgetError(
                f"a budget of {limit:,.0f} {kind} cannot be reached: {floor:,} is the least that can stay (of {full:,})",
                why="frozen channels and the last channel of every group stay",
                fix=f"ask for at least {kind}={floor / full:.3f}"
                + (", or a smaller round_to" if self.request.round_to > 1 else ""),
            )
        for _ in range(40):
            middle = (low + high) / 2
            found = self.at(middle)
            if cost(found) <= limit:
                best, high = found, middle
            else:
                low = middle
            if high - low < 1e-7:
                break
        return best

    # -- bands ----------------------------------------------------------------------------------------------------

    def bands(self, ratio: float) -> list[Band]:
        chosen = self._sides(ratio)
        key = tuple(group.name for group in chosen)
        if key not in self._bands:
            self._bands[key] = self._build(chosen)
        return self._bands[key]

    def _sides(self, ratio: float) -> list[Group]:
        """All plain groups, and of each grid its rows or its columns."""
        grids: dict[int, dict[str, list[Group]]] = defaultdict(lambda: {"rows": [], "middle": [], "columns": []})
        for group in self.groups:
            if group.kind != "channels":
                grids[group.grid][group.kind].append(group)
        drop: set[str] = set()
        for sides in grids.values():
            outer = sides["rows"] or sides["middle"]
            inner = [g for g in sides["middle"] + sides["columns"] if g not in outer]
            if not outer or not inner:
                continue

            def miss(side: list[Group]) -> float:
                bands = [(g.steps, min(round(ratio * g.steps), g.steps - 1)) for g in side]
                return max(abs(k / steps - ratio) for steps, k in bands)

            several = all(g.steps - round(ratio * g.steps) > 1 for g in outer)  # code treats dims of size 1 differently
            whole = several and any(g.batched for g in outer) and miss(outer) <= miss(inner) + 1e-9
            if sides["middle"]:  # grids within grids: what the rows lose, all of them lose
                whole = True
            drop |= {g.name for g in (inner if whole else outer)}
        return [g for g in self.groups if g.name not in drop]

    def _build(self, chosen: list[Group]) -> list[Band]:
        tied = nx.Graph()
        tied.add_nodes_from(range(len(chosen)))
        place = {group.name: i for i, group in enumerate(chosen)}
        tied.add_edges_from((place[a], place[b]) for a, b in self.links if a in place and b in place)
        return [self._band([chosen[i] for i in sorted(found)]) for found in nx.connected_components(tied)]

    def _band(self, groups: list[Group]) -> Band:
        steps = math.gcd(*[g.steps for g in groups])
        per = [g.steps // steps for g in groups]
        order, score = [], np.zeros(steps)
        for group, count in zip(groups, per, strict=True):
            found = self.score(group)
            rank = np.stack([_ranked(*lane) for lane in zip(found, group.strata, strict=True)])
            order.append(np.take_along_axis(group.lanes, rank, axis=1))
            ranked = np.take_along_axis(found, rank, axis=1).mean(axis=0)
            score += ranked.reshape(steps, count).mean(axis=1) / len(groups)
        kept = max(max(len(np.unique(lane)) for lane in group.strata) / count for group, count in zip(groups, per, strict=True))
        return Band(groups, per, order, score, groups[0].width / steps, math.ceil(kept))


def _ranked(scores: Track, strata: Track) -> Track:
    """Order of a lane's units, first to leave first.

    Units that touch other slots form strata; each loses the same share, and the best unit of each comes last, so that no
    slot is ever emptied.
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
