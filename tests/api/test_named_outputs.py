"""Outputs that nobody reads: named outputs stay, the others may lose channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError


class Encoder(nn.Module):
    """Gives its hidden states beside the answer, as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        hidden = self.body(x)
        return {"logits": self.head(hidden), "states": (hidden,)}


def test_only_named_outputs_stay() -> None:
    model, x = Encoder(), torch.randn(3, 6)
    assert surgeon.shrink(model, 0.5, example_inputs=x, round_to=1).body[2].out_features == 12
    surgery = surgeon.inspect(model, x, outputs=["logits"])
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert small.body[2].out_features == 6
    found = small(x)
    assert found["logits"].shape == (3, 4)
    assert found["states"][0].shape == (3, 6)
    proof = surgeon.verify(model, small, plan, x)  # knows from the plan which outputs count
    assert list(proof.errors) == ["logits"]
    assert surgeon.shrink(model, 0.5, example_inputs=x, outputs=["states"], round_to=1).head.out_features == 2


def test_a_plan_from_a_file_knows_its_outputs(tmp_path: object) -> None:
    model, x = Encoder(), torch.randn(3, 6)
    surgeon.inspect(model, x, outputs=["logits"]).plan(0.5).save(f"{tmp_path}/plan.json")
    plan = surgeon.Plan.load(f"{tmp_path}/plan.json")
    assert surgeon.verify(model, plan.apply(model), plan, x).error < 1e-9


def test_an_unknown_output() -> None:
    with pytest.raises(InputError, match=r"no output 'logit'[\s\S]*'logits', 'states.0'"):
        surgeon.inspect(Encoder(), torch.randn(3, 6), outputs=["logit"])
