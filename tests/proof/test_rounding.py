"""Limits of a proof for networks whose gains carry a last bit far: faithful cuts pass, wrong ones do not."""

from __future__ import annotations

import pytest
import torch
from steep import Steep
from torch import Tensor, nn
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


class Averaged(nn.Module):
    """In training mode, with one sample, the mean of what a batch norm gives is zero: only rounding is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 200), nn.Linear(200, 64)
        self.n, self.fc = nn.BatchNorm1d(64), nn.Linear(64, 5)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.b(self.a(x)).transpose(1, 2))
        return self.fc((y if self.training else y * 1.0).mean(2))


def test_what_is_rounding_alone_is_shown_with_other_numbers() -> None:
    torch.manual_seed(0)
    model, x = Averaged().eval(), torch.randn(1, 50, 6)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert len(surgery.runs) == 2
    proof = surgeon.verify(model, small, plan, graph=surgery.runs)
    assert proof.error <= proof.tolerance == 1e-9
    training = surgery.runs[1:]  # what this run alone shows
    assert surgeon.verify(model, small, plan, graph=training).error <= 1e-9
    tried = [bad for bad in wrong_cuts(model, plan) if "fc.weight" in bad[1].kept]
    assert len(tried) >= 6
    for wrong, bad in tried:
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, graph=training)
