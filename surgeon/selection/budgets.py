"""Budgets: the choice of a planner that removes least and costs no more than any budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from surgeon.errors import BlockWarning, BudgetError, warn
from surgeon.selection.cost import Choice, nothing
from surgeon.selection.knapsack import solve as knapsack
from surgeon.selection.linked_groups import LinkedGroups
from surgeon.selection.planner import Planner, State

Costs = Mapping[str, Callable[[Choice], float]]
_UNITS = {"macs": "MACs", "size": "bytes", "memory": "bytes of activations"}
_TIGHTER = 20  # times that the limit of a knapsack is lowered
_NARROWEST = 1e-7  # ratios closer than this remove the same


@dataclasses.dataclass
class Budgets:
    """Searches what a planner can take."""

    planner: Planner

    def within(self, costs: Costs) -> Choice:
        """The choice that removes least and costs no more than any budget."""
        whole = nothing(self.planner.shapes.solution)
        full = {kind: cost(whole) for kind, cost in costs.items()}
        limits = {kind: self.planner.request.limit(kind, full[kind]) for kind in costs}

        def holds(state: State) -> bool:
            choice = self.planner.choice(state)
            return all(cost(choice) <= limits[kind] for kind, cost in costs.items())

        free = next((kind for kind in costs if not full[kind]), None)
        if free is not None:
            raise BudgetError(
                f"the model has 0 {_UNITS.get(free, free)}, so that no budget says what is to leave",
                why="no convolution, matrix product or attention ran" if free == "macs" else "",
                fix="pass a ratio, or another budget",
            )
        if all(full[kind] <= limits[kind] for kind in costs):
            return whole
        asked = self.planner.block
        while not holds(best := self.planner.at(math.nextafter(1.0, 0.0))):
            if not self.planner.relaxed():
                raise self._too_low(costs, full, limits, self.planner.choice(best))
        if self.planner.narrow:
            block = self.planner.block
            warn(
                f"no whole blocks of {asked} channels meet the budget, so that widths are multiples of {block}, in narrow "
                f"groups of less; kernels like {asked}: expect less speed-up than the MACs promise",
                BlockWarning,
            )
        if self.planner.request.scope == "knapsack":
            best = self._weighed(costs, limits, holds, best)
            self._fill(best, holds)
            return self.planner.choice(best)
        best = self._least(holds, best)
        self._fill(best, holds)
        return self.planner.choice(best)

    def _least(
        self,
        holds: Callable[[State], bool],
        best: State,
        scope: str | None = None,
        linked_groups: list[LinkedGroups] | None = None,
    ) -> State:
        """What leaves at the smallest ratio that holds; `best` holds."""
        low, high = 0.0, 1.0
        while high - low > _NARROWEST:
            middle = (low + high) / 2
            found = self.planner.at(middle, scope, linked_groups)
            if holds(found):
                best, high = found, middle
            else:
                low = middle
        return best

    def _weighed(
        self, costs: Costs, limits: Mapping[str, float], holds: Callable[[State], bool], least: State
    ) -> State:
        """The knapsack's choice, from where the other scopes end; its limit is lowered until every budget
        holds.
        """
        linked_groups = self.planner.linked_groups(0.5)
        most = self.planner.at(math.nextafter(1.0, 0.0), "uniform", linked_groups)
        starts = (
            [self._least(holds, most, scope, linked_groups) for scope in ("uniform", "global")]
            if holds(most)
            else []
        )

        def cost(counts: list[int]) -> float:
            choice = self.planner.choice(State(linked_groups, counts))
            return sum(cost(choice) / limits[kind] for kind, cost in costs.items())

        limit = float(len(costs))
        for _ in range(_TIGHTER):
            state = State(
                linked_groups, knapsack(linked_groups, cost, limit, [state.counts for state in starts])
            )
            if holds(state):
                return state
            limit *= 0.95
        return least

    def _fill(self, state: State, holds: Callable[[State], bool]) -> None:
        """Give steps back while all budgets hold, those with the highest scores first."""

        def value(number: int) -> float:
            linked, count = state.linked_groups[number], state.counts[number]
            return float(linked.score[count - 1] / max(linked.score.mean(), 1e-30)) if count else -math.inf

        fits = True
        while fits:
            fits = False
            for number in sorted(range(len(state.linked_groups)), key=value, reverse=True):
                before = state.counts[number]
                less = state.linked_groups[number].fewer(before)
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
        holders = sorted(self.planner.shapes.params_by_tensor(least).items(), key=lambda item: -item[1])[:3]
        held = ", ".join(f"{name} ({count:,} params)" for name, count in holders)
        narrower = f", or a smaller round_to than {self.planner.block}" if self.planner.block > 1 else ""
        limit, least_of, whole = (_shown(kind, value) for value in (limits[kind], floor, full[kind]))
        return BudgetError(
            f"a budget of {limit} cannot be reached: {least_of} is the least that can stay (of {whole})",
            why=f"frozen channels and the last channels of every group stay; most of what is left: {held}",
            fix=f"ask for at least {kind}={floor / full[kind]:.3f}{narrower}; print(surgeon.inspect(model)) says why",
        )


def _shown(kind: str, value: float) -> str:
    """A number with its unit."""
    return f"{value:.3g} ms" if kind == "latency" else f"{value:,.0f} {_UNITS.get(kind, kind)}"
