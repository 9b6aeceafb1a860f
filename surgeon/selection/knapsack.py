"""solve(linked_groups, cost, limit) -> counts: what to remove so that the layers keep most of their importance within
a budget.

Linked groups keep a share of its importance (the squared scores of what stays); the product of these shares over
all slots that they hold is kept as large as possible, so that no layer is emptied for the sake of
others, and a residual stream counts once for every layer that it runs through. (Scores that add up, such as
those of `kfac`, are summed instead.) Per count of steps they have a value and a cost, and dynamic
programming over them picks one count each (a multiple-choice knapsack; Shen et al., HALP, NeurIPS 2022, use
one for latency). What they cost hangs on the widths around it, so the costs are measured at the last
solution and the knapsack is solved again, a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from surgeon.ops.ids import DimIds
from surgeon.selection.linked_groups import LinkedGroups

_BINS = 1000  # how finely the budget is divided
_OPTIONS = 12  # counts tried for each: evenly spread legal ones
_ROUNDS = 3


def solve(
    linked_groups: Sequence[LinkedGroups],
    cost: Callable[[list[int]], float],
    limit: float,
    starts: Sequence[list[int]] = (),
) -> list[int]:
    """Counts of steps that leave, for each of the linked groups; the cheapest ones if the limit cannot be met.

    Args:
        cost: of all together, given their counts.
        starts: solutions to start from, each by itself; the result loses no more than any of them that is
            within the limit.
    """
    third = [
        int(found[np.argmin(np.abs(found - linked.steps / 3))])
        for found, linked in ((linked.legal(), linked) for linked in linked_groups)
    ]
    found = [_improved(linked_groups, cost, limit, counts) for counts in (starts or [third])]
    return min(found, key=lambda pair: pair[0])[1]


def _improved(
    linked_groups: Sequence[LinkedGroups], cost: Callable[[list[int]], float], limit: float, counts: list[int]
) -> tuple[float, list[int]]:
    """(what is lost, counts) of the best solution met; infinite if none is within the limit."""
    options = [
        np.union1d(_spread(linked.legal()), [count])
        for linked, count in zip(linked_groups, counts, strict=True)
    ]
    losses = [_losses(linked, found) for linked, found in zip(linked_groups, options, strict=True)]

    def lost(counts: list[int]) -> float:
        each = zip(losses, options, counts, strict=True)
        return sum(float(loss[np.flatnonzero(found == count)[0]]) for loss, found, count in each)

    whole = cost(counts)
    best = (lost(counts) if whole <= limit else np.inf, counts)
    for _ in range(_ROUNDS):
        curves = [_curve(cost, counts, number, found, whole) for number, found in enumerate(options)]
        fixed = whole - sum(
            curve[np.flatnonzero(found == count)[0]]
            for curve, found, count in zip(curves, options, counts, strict=True)
        )
        counts = _fill(options, losses, curves, limit - fixed)
        whole = cost(counts)
        if whole > limit and not np.isfinite(best[0]):
            best = (np.inf, counts)
        elif whole <= limit and lost(counts) < best[0]:
            best = (lost(counts), counts)
    return best


def _spread(counts: DimIds) -> DimIds:
    if len(counts) <= _OPTIONS:
        return counts
    some: DimIds = counts[np.unique(np.linspace(0, len(counts) - 1, _OPTIONS).round().astype(int))]
    return some


def _losses(linked: LinkedGroups, counts: DimIds) -> DimIds:
    """-log of the share of importance that stays, once for every slot; of additive scores what is lost."""
    if linked.additive:
        lost: DimIds = np.concatenate([[0.0], np.cumsum(linked.score)])[counts]
        return lost
    energy = np.concatenate([[0.0], np.cumsum(np.maximum(linked.score, 0.0) ** 2 + 1e-12)])
    share = 1 - energy[counts] / energy[-1]
    found: DimIds = -np.log(np.maximum(share, 1e-12)) * linked.slots
    return found


def _curve(
    cost: Callable[[list[int]], float], counts: list[int], number: int, options: DimIds, whole: float
) -> DimIds:
    """What all cost more or less if this one loses another count; 0 at the present one."""
    found = []
    for option in options:
        other = [*counts[:number], int(option), *counts[number + 1 :]]
        found.append(0.0 if option == counts[number] else cost(other) - whole)
    curve: DimIds = np.asarray(found) - min(found)
    return curve


def _fill(
    options: Sequence[DimIds], losses: Sequence[DimIds], curves: Sequence[DimIds], room: float
) -> list[int]:
    """Dynamic programming: the least loss for each amount spent, one after the other."""
    least = [int(np.argmin(curve)) for curve in curves]
    if room <= 0:
        return [int(found[i]) for found, i in zip(options, least, strict=True)]
    weight = [np.ceil(curve / room * _BINS - 1e-9).astype(int) for curve in curves]
    table = np.full(_BINS + 1, np.inf)
    table[0] = 0.0
    picks = []
    for loss, bins in zip(losses, weight, strict=True):
        new, pick = np.full(_BINS + 1, np.inf), np.zeros(_BINS + 1, dtype=int)
        for option, (lost, bin_) in enumerate(zip(loss, bins, strict=True)):
            if bin_ > _BINS:
                continue
            moved = np.full(_BINS + 1, np.inf)
            moved[bin_:] = table[: _BINS + 1 - bin_] + lost
            better = moved < new
            new[better], pick[better] = moved[better], option
        table = new
        picks.append(pick)
    if not np.isfinite(table).any():
        return [int(found[i]) for found, i in zip(options, least, strict=True)]
    place = int(np.argmin(table))
    chosen = []
    for pick, bins in zip(reversed(picks), reversed(weight), strict=True):
        chosen.append(int(pick[place]))
        place -= int(bins[chosen[-1]])
    return [int(found[i]) for found, i in zip(options, reversed(chosen), strict=True)]
