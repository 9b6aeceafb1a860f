"""Limits of a proof for networks whose gains carry a last bit far: faithful cuts pass, wrong ones do not."""

from __future__ import annotations

import pytest
import torch
from steep import Steep
from wrong import wrong_cuts

import surgeon
from surgeon.errors import ProofError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def prepared(depth: int) -> tuple[Steep, surgeon.Plan, Steep]:
    torch.manual_seed(0)
    model = Steep(depth)
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    return model, plan, plan.apply(model)


def test_the_limit_is_as_usual_where_rounding_is() -> None:
    model, plan, small = prepared(2)
    proof = surgeon.verify(model, small, plan, X)
    assert proof.tolerance == 1e-9 and proof.error < 1e-13 and "allowed" not in str(proof)


def test_a_faithful_cut_of_a_steep_network_passes_and_wrong_ones_do_not() -> None:
    model, plan, small = prepared(26)
    proof = surgeon.verify(model, small, plan, X)
    assert 1e-9 < proof.error <= proof.tolerance <= 1e-3
    assert "16 times what rounding changes in the original" in str(proof)
    with pytest.raises(ProofError, match="allowed 1e-09"):
        surgeon.verify(model, small, plan, X, tolerance=1e-9)
    tried = 0
    for wrong, bad in list(wrong_cuts(model, plan))[::6]:
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, X)
        tried += 1
    assert tried >= 8


def test_where_rounding_alone_changes_all_nothing_is_proved() -> None:
    model, plan, small = prepared(50)
    with pytest.raises(ProofError, match="times what rounding changes"):
        surgeon.verify(model, small, plan, X)
