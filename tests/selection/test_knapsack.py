"""The knapsack: counts that lose the least within a limit, against all combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from surgeon.coupling.groups import Group, Member
from surgeon.selection.knapsack import solve
from surgeon.selection.linked_groups import LinkedGroups


def linked_groups(sizes: Sequence[int], seed: int = 0) -> list[LinkedGroups]:
    rng = np.random.default_rng(seed)
    sets = [np.arange(n)[None] for n in sizes]
    slots = [
        [Member(f"w{place}", 0, one_set[0], one_set[0]) for place in range(number)]
        for number, one_set in enumerate(sets, 1)
    ]
    groups = [
        Group(f"g{number}", one_set, slots[number], np.zeros_like(one_set))
        for number, one_set in enumerate(sets)
    ]
    return [
        LinkedGroups([group], [1], [group.sets], np.sort(rng.random(group.steps) + 0.1)) for group in groups
    ]


def lost(some: Sequence[LinkedGroups], counts: Sequence[int]) -> float:
    """The first group touches one slot, the second two, the third three."""
    shares = [1 - (b.score[:k] ** 2).sum() / (b.score**2).sum() for b, k in zip(some, counts, strict=True)]
    return sum(-slots * math.log(share) for slots, share in enumerate(shares, 1))


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_against_all_combinations(seed: int) -> None:
    some, weight = linked_groups([5, 6, 7], seed), np.random.default_rng(seed).random(3) + 0.2

    def cost(counts: Sequence[int]) -> float:
        return float(sum(w * (b.steps - k) for w, b, k in zip(weight, some, counts, strict=True)))

    limit = 0.6 * cost([0, 0, 0])
    best = min(lost(some, c) for c in itertools.product(range(5), range(6), range(7)) if cost(c) <= limit)
    found = solve(some, cost, limit)
    assert cost(found) <= limit
    assert lost(some, found) <= best * 1.02 + 1e-9


def test_the_knapsack_takes_the_cheapest_if_nothing_fits() -> None:
    some = linked_groups([4, 4])
    assert solve(some, lambda counts: 100.0 - sum(counts), 1.0) == [3, 3]


@pytest.mark.parametrize("seed", (90, 238, 320, 353, 354, 363))
def test_the_best_that_was_met_is_kept(seed: int) -> None:
    """Where costs are products of widths, a further round may lead away from the best counts, as for these seeds."""
    some, rng = linked_groups([5, 6, 7], seed), np.random.default_rng(seed + 1000)
    pairs, share = np.triu(rng.random((3, 3)) ** 3, 1), rng.uniform(0.2, 0.7)

    def cost(counts: Sequence[int]) -> float:
        widths = np.array([group.steps - count for group, count in zip(some, counts, strict=True)])
        return float(widths @ pairs @ widths + 0.03 * widths.sum())

    limit = share * cost([0, 0, 0])
    within = [c for c in itertools.product(range(5), range(6), range(7)) if cost(c) <= limit]
    best = min(within, key=lambda counts: lost(some, counts))
    found = solve(some, cost, limit, starts=[list(best)])
    assert cost(found) <= limit and lost(some, found) <= lost(some, best) + 1e-9
