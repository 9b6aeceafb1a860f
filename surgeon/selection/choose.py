"""choose(...) -> (Choice, block): which units leave, from scores and a ratio or budgets.

Scopes: `uniform` removes the same share of every band (see `bands`); `global` removes the lowest scores
wherever they are; `isomorphic` does so among groups of like structure; `knapsack` weighs importance against
cost (see there). A budget is met from below: the ratio is searched at which all budgets just hold, then
whatever still fits is given back, the highest scores first, until no band can take one step more.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping

import numpy as np

from surgeon.coupling.groups import Group, Link
from surgeon.errors import BudgetError, InputError
from surgeon.ops.ids import DimIds
from surgeon.selection.amounts import matches, of_pattern
from surgeon.selection.cost import Choice, ShapeModel, needed_blocks, nothing
from surgeon.selection.knapsack import solve as knapsack
from surgeon.selection.linked_groups import LinkedGroups, build, narrowed, sides, without_kept_heads
from surgeon.selection.request import Request

Costs = Mapping[str, Callable[[Choice], float]]
_UNITS = {"macs": "MACs", "size": "bytes", "memory": "bytes of activations"}
_TIGHTER = 20  # times that the limit of a knapsack is lowered
_NARROWEST = 1e-7  # ratios closer than this remove the same


def choose(
    groups: list[Group],
    scores: Callable[[Group], DimIds],
    shapes: ShapeModel,
    request: Request,
    links: Iterable[Link] = (),
    block: int = 1,
    costs: Costs | None = None,
    additive: bool = False,
) -> tuple[Choice, int]:
    """The choice that meets the request, and the block that its widths are multiples of.

    Args:
        scores: [lanes, steps] of a group, low leaves first.
        links: pairs of groups that keep the same share.
        block: kept widths are multiples of it; of less under "auto" if a budget cannot be met otherwise,
            which is warned of.
        costs: what budgets are counted in, by name; those of `shapes` if left out.
        additive: whether scores add up over groups to what is lost.

    Raises:
        BudgetError: there is nothing to remove, or a budget lies below what must stay.
        InputError: a pattern of the request matches no group.
    """
    links = list(links)
    _check_patterns(request, groups)
    groups = without_kept_heads(groups, request.options["heads"], links)
    if not groups:
        raise BudgetError(
            "the model has no group of channels that may leave",
            why="everything that was found is frozen",
            fix="print(surgeon.inspect(model)) names each frozen tensor and the reason",
        )
    planner = _Planner(groups, scores, shapes, request, links, block, additive)
    if request.ratio is not None:
        return planner.choice(
            planner.at(request.ratio if isinstance(request.ratio, int | float) else 0.5)
        ), block
    known = costs or {kind: getattr(shapes, kind) for kind in request.budgets}
    return planner.within({kind: known[kind] for kind in request.budgets}), planner.block


def _check_patterns(request: Request, groups: list[Group]) -> None:
    names = {member.tensor for group in groups for member in group.members}
    for name, value in (("ratio", request.ratio), ("max_ratio", request.options["max_ratio"])):
        for pattern in value if isinstance(value, Mapping) else ():
            if not any(matches(pattern, tensor) for tensor in names):
                raise InputError(
                    f"{name} names {pattern!r}, which matches no layer that may lose channels",
                    fix="use names as in model.named_modules(), with * for any part",
                )
    if isinstance(request.ratio, Mapping) and request.scope != "uniform":
        raise InputError(
            f"ratios by name and scope {request.scope!r} contradict each other",
            fix="leave scope out, or pass one ratio and caps by name: max_ratio={...}",
        )


@dataclasses.dataclass
class _State:
    """How many steps each band loses."""

    bands: list[LinkedGroups]
    counts: list[int]


class _Planner:
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
        self._narrow = False  # whether groups of convolutions that hold one block may keep a part of it
        self._bands: dict[tuple[str, ...], list[LinkedGroups]] = {}
        self._slots: dict[str, list[DimIds]] = {}
        self._needed = needed_blocks(shapes.graph)

    def bands(self, ratio: float) -> list[LinkedGroups]:
        asked = self.request.ratio if isinstance(self.request.ratio, Mapping) else ratio
        chosen = sides(self.groups, lambda group: of_pattern(asked, group.producers, 0.0))
        key = tuple(group.name for group in chosen)
        if key not in self._bands:
            found = self._built(chosen, self._block)
            if isinstance(self.request.options["round_to"], str) and all(
                len(band.legal()) == 1 for band in found
            ):
                found = self._built(chosen, self._narrowed)
            self._bands[key] = found
        return self._bands[key]

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
        if self._narrow:
            return self._narrowed(group)
        convolved = any(tensors[member.tensor].dim() > 2 for member in group.members)
        return self.block if convolved and group.width >= self.block else narrowed(self.block, group.width)

    def _relaxed(self) -> bool:
        """Whether smaller parts of groups may leave now than before; never where the user named the block."""
        if self.request.options["round_to"] != "auto" or (self._narrow and self.block == 1):
            return False
        if self._narrow:
            self.block //= 2
        self._narrow = True
        self._bands.clear()
        return True

    # -- how many leave --------------------------------------------------------------------------------------

    def at(self, ratio: float, scope: str | None = None, bands: list[LinkedGroups] | None = None) -> _State:
        """What leaves at this share of channels."""
        bands = self.bands(ratio) if bands is None else bands
        scope = scope or self.request.scope
        counts = [0] * len(bands)
        if scope == "uniform":
            counts = [
                band.nearest((ratio if band.ratio is None else band.ratio) * band.steps) for band in bands
            ]
        else:
            pools: dict[Hashable, list[int]] = defaultdict(list)
            for number, band in enumerate(bands):
                pools[_structure(band) if scope == "isomorphic" else ""].append(number)
            for pool in pools.values():
                for number, count in _lowest([bands[i] for i in pool], ratio).items():
                    counts[pool[number]] = bands[pool[number]].nearest(count)
        return _State(bands, counts)

    def choice(self, state: _State) -> Choice:
        """The units that leave; fewer where units of one group would together take all indices of a slot."""
        choice = nothing(self.shapes.solution)
        for band, count in zip(state.bands, state.counts, strict=True):
            band.remove(choice, count)
            while count and any(self._empties(choice, group) for group in band.groups):
                band.give_back(choice)
                count = band.fewer(count) or 0
                band.remove(choice, count)
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

    # -- budgets ---------------------------------------------------------------------------------------------

    def within(self, costs: Costs) -> Choice:
        """The choice that removes least and costs no more than any budget."""
        whole = nothing(self.shapes.solution)
        full = {kind: cost(whole) for kind, cost in costs.items()}
        limits = {kind: self.request.limit(kind, full[kind]) for kind in costs}

        def holds(state: _State) -> bool:
            choice = self.choice(state)
            return all(cost(choice) <= limits[kind] for kind, cost in costs.items())

        if all(full[kind] <= limits[kind] for kind in costs):
            return whole
        asked = self.block
        while not holds(best := self.at(math.nextafter(1.0, 0.0))):
            if not self._relaxed():
                raise self._too_low(costs, full, limits, self.choice(best))
        if self._narrow:
            warnings.warn(
                f"no whole blocks of {asked} channels meet the budget, so that widths are multiples of {self.block}, in narrow "
                f"groups of less; kernels like {asked}: expect less speed-up than the MACs promise",
                stacklevel=6,
            )
        if self.request.scope == "knapsack":
            best = self._weighed(costs, limits, holds, best)
            self._fill(best, holds)
            return self.choice(best)
        best = self._least(holds, best)
        self._fill(best, holds)
        return self.choice(best)

    def _least(
        self,
        holds: Callable[[_State], bool],
        best: _State,
        scope: str | None = None,
        bands: list[LinkedGroups] | None = None,
    ) -> _State:
        """What leaves at the smallest ratio that holds; `best` holds."""
        low, high = 0.0, 1.0
        while high - low > _NARROWEST:
            middle = (low + high) / 2
            found = self.at(middle, scope, bands)
            if holds(found):
                best, high = found, middle
            else:
                low = middle
        return best

    def _weighed(
        self, costs: Costs, limits: Mapping[str, float], holds: Callable[[_State], bool], least: _State
    ) -> _State:
        """The knapsack's choice, from where the other scopes end; its limit is lowered until every budget
        holds.
        """
        bands = self.bands(0.5)
        most = self.at(math.nextafter(1.0, 0.0), "uniform", bands)
        starts = (
            [self._least(holds, most, scope, bands) for scope in ("uniform", "global")] if holds(most) else []
        )

        def cost(counts: list[int]) -> float:
            choice = self.choice(_State(bands, counts))
            return sum(cost(choice) / limits[kind] for kind, cost in costs.items())

        limit = float(len(costs))
        for _ in range(_TIGHTER):
            state = _State(bands, knapsack(bands, cost, limit, [state.counts for state in starts]))
            if holds(state):
                return state
            limit *= 0.95
        return least

    def _fill(self, state: _State, holds: Callable[[_State], bool]) -> None:
        """Give steps back while all budgets hold, those with the highest scores first."""

        def value(number: int) -> float:
            band, count = state.bands[number], state.counts[number]
            return float(band.score[count - 1] / max(band.score.mean(), 1e-30)) if count else -math.inf

        fits = True
        while fits:
            fits = False
            for number in sorted(range(len(state.bands)), key=value, reverse=True):
                before = state.counts[number]
                less = state.bands[number].fewer(before)
                if less is None:
                    continue
                state.counts[number] = less
                if holds(state):
                    fits = True
                else:
                    state.counts[number] = before

    def _too_low(
        self, costs: Costs, full: Mapping[str, float], limits: Mapping[str, float], least: Choice
    ) -> BudgetError:
        kind = next(kind for kind, cost in costs.items() if cost(least) > limits[kind])
        floor = costs[kind](least)
        holders = sorted(self.shapes.params_by_tensor(least).items(), key=lambda item: -item[1])[:3]
        held = ", ".join(f"{name} ({count:,} params)" for name, count in holders)
        narrower = f", or a smaller round_to than {self.block}" if self.block > 1 else ""
        limit, least_of, whole = (_shown(kind, value) for value in (limits[kind], floor, full[kind]))
        return BudgetError(
            f"a budget of {limit} cannot be reached: {least_of} is the least that can stay (of {whole})",
            why=f"frozen channels and the last channels of every group stay; most of what is left: {held}",
            fix=f"ask for at least {kind}={floor / full[kind]:.3f}{narrower}; print(surgeon.inspect(model)) says why",
        )


def _shown(kind: str, value: float) -> str:
    """A number with its unit."""
    return f"{value:.3g} ms" if kind == "latency" else f"{value:,.0f} {_UNITS.get(kind, kind)}"


def _lowest(bands: list[LinkedGroups], ratio: float) -> dict[int, int]:
    """Steps that leave if the lowest scores of all these bands do, up to this share of their channels."""
    total = sum(band.width * band.steps for band in bands)
    entries = sorted(
        (
            (float(score), number)
            for number, band in enumerate(bands)
            for score in np.maximum.accumulate(band.score)[: max(band.steps - band.kept, 0)]
        ),
        key=lambda entry: entry[0],
    )
    counts: dict[int, int] = defaultdict(int)
    gone = 0.0
    for _, number in entries:
        if gone + bands[number].width / 2 > ratio * total:
            break
        counts[number] += 1
        gone += bands[number].width
    return counts


def _structure(band: LinkedGroups) -> Hashable:
    """What groups of like structure have in common: the kinds of slots that they touch, and how often (Fang
    et al., 2024).
    """
    return tuple(
        (
            group.kind,
            group.attention,
            tuple(sorted(Counter((m.tensor.rpartition(".")[2], m.dim) for m in group.members).items())),
        )
        for group in band.groups
    )
