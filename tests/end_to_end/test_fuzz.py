"""Random small networks, cut at random: the proof must hold for each, and few may be refused.

SURGEON_FUZZ=N draws N new examples in each part instead of the 40 that are always the same; SURGEON_FUZZ_SEED says
which. A failing example prints as a `Wiring(...)` that makes it again.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from typing import Any

import pytest
import random_constants  # noqa: F401  # registers blocks
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_networks import BLOCKS, Wiring
from random_paths import other_call

import surgeon
from surgeon.coupling.groups import Group
from surgeon.errors import BudgetError, MendError

ASKED = int(os.environ.get("SURGEON_FUZZ", "0"))
SEED = os.environ.get("SURGEON_FUZZ_SEED") or (int.from_bytes(os.urandom(4), "big") if ASKED else 0)
SIDES, WIDTHS = st.integers(4, 8), st.sampled_from((3, 4, 6, 1, 2))
SHAPES = st.one_of(
    st.builds(lambda c, h, w: (2, c, h, w), WIDTHS, SIDES, SIDES),
    st.builds(lambda n, d: (2, n, d), SIDES, WIDTHS),
    st.builds(lambda d: (2, d), WIDTHS),
)
NUMBERS = st.integers(0, 1 << 16)
STEPS = st.tuples(
    st.sampled_from([name for name in BLOCKS if name != "head"]), st.integers(0, 255), NUMBERS
)  # few: shrinks well
REQUESTS = st.fixed_dictionaries({
    "ratio": st.sampled_from((0.5, 0.25, 0.75)),
    "scope": st.sampled_from(("uniform", "global", "isomorphic")),
    "round_to": st.sampled_from((1, 2, 4, "auto")),
    "seed": st.integers(0, 9),
    "calls": st.sampled_from((1, 1, 2)),
})  # fmt: skip


@st.composite
def wirings(draw: Any) -> Wiring:
    wiring = Wiring(
        draw(st.lists(SHAPES, min_size=1, max_size=2)), (), draw(st.sampled_from(("tensor", "dict", "list")))
    )
    for name in tuple(wiring.values):
        wiring.add("project", name, draw(NUMBERS))
    for step in draw(st.lists(STEPS, min_size=1, max_size=12)):
        wiring.draw(*step)
    return wiring.finish()


def outcome(wiring: Wiring, request: dict[str, Any]) -> str:
    """Cut and prove: "cut", "whole" (nothing left, and nothing had to), or the name of the error that
    refused.

    Raises:
        AssertionError, ProofError, any other error: the property does not hold.
    """
    model, inputs = wiring.net, wiring.inputs
    request = dict(request)
    other = other_call(wiring) if request.pop("calls") == 2 else None
    calls = inputs if other is None else surgeon.Calls([inputs, other])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery = surgeon.inspect(model, calls)
    try:
        plan = surgery.plan(criterion="random", **request)
        small = plan.apply(model)
    except (BudgetError, MendError) as error:
        return type(error).__name__
    proof = surgeon.verify(model, small, plan, calls)
    assert proof.error <= 1e-9
    assert proof.compared > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert plan.params == sum(p.numel() for p in small.parameters())
    with torch.no_grad():
        for given in (*([other] if other else []), inputs):
            small(*(torch.randn(3, *x.shape[1:]) for x in given))
        if trains(model, inputs):
            small.train()(*inputs)
    if plan.params < plan.params_before:
        return "cut"
    linked = {name for link in surgery.links for name in link}
    assert request["scope"] != "uniform" or not any(
        must_lose(g, request) for g in surgery.groups if g.name not in linked
    )
    return "whole"


def trains(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether a model runs in training mode; one with statistics of a single value does not."""
    try:
        copy.deepcopy(model).train()(*inputs)
    except ValueError:
        return False
    return True


def must_lose(group: Group, request: dict[str, Any]) -> bool:
    """Whether a plain group has a step to lose at this ratio; where widths are rounded or a grid has two
    sides, it may not.
    """
    free = group.steps - max(len(set(one_set)) for one_set in group.strata.tolist())
    return (
        request["round_to"] == 1
        and group.kind == "channels"
        and free > 0
        and round(request["ratio"] * group.steps) > 0
    )


@pytest.mark.parametrize("part", range(4))
def test_random_networks(part: int) -> None:
    """Each part draws other networks, always the same ones unless more are asked for."""
    outcomes: Counter[str] = Counter()

    @seed(int(SEED) + part)
    @settings(
        max_examples=ASKED or 40,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(wirings(), REQUESTS)
    def holds(wiring: Wiring, request: dict[str, Any]) -> None:
        outcomes[outcome(wiring, request)] += 1

    holds()
    print("outcomes", json.dumps(outcomes))
    if ASKED:
        return  # near examples are drawn one after the other: in a short run shares of outcomes say little
    total = outcomes.total()
    assert outcomes["cut"] >= 0.6 * total, outcomes
    assert outcomes["MendError"] <= 0.1 * total, outcomes
    assert outcomes["BudgetError"] <= 0.1 * total, outcomes


def test_a_number_in_source_gets_no_sign() -> None:
    """A pad of attention explains a negative size only with a sign that the source has no place for."""
    steps = [
        ("project", "x", 0),
        ("tokens", "project0", 0),
        ("attention", "tokens1", 658),
        ("attention", "attention2", 658),
    ]
    wiring = Wiring([(2, 3, 4, 4)], steps, "tensor").finish()
    assert (
        outcome(wiring, {"ratio": 0.75, "scope": "isomorphic", "round_to": 1, "seed": 0, "calls": 1}) == "cut"
    )
