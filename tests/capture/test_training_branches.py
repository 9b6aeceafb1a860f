"""What only a training run does is seen, cut and proved where a model's code decides by the mode."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrong import wrong_cuts

import surgeon
from surgeon.capture.training_branches import decides_by_mode
from surgeon.errors import ProofError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate


class HandsOn(Part):
    def forward(self, x: Tensor) -> Tensor:
        p = self.rate if self.training else 0.0
        return F.dropout(F.dropout(x, p), 0.5, self.training)


class Decides(Part):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return x


class Chooses(Part):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.training else x


class AndRate(Part):
    def forward(self, x: Tensor) -> Tensor:
        if self.rate > 0 and self.training:
            x = x * torch.rand(1)
        return x


class OrNoRate(Part):
    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return x * torch.rand(1)


class AndOthers(Part):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.training and y is None:
            x = x * 2
        return x


@pytest.mark.parametrize(
    ("make", "decides"),
    [
        (HandsOn, False),
        (Decides, True),
        (Chooses, True),
        (AndRate, False),
        (lambda: AndRate(0.5), True),
        (OrNoRate, False),
        (lambda: OrNoRate(0.5), True),
        (AndOthers, True),
        (lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(6)), False),
        (lambda: nn.Sequential(nn.Linear(6, 6), Decides()), True),
    ],
)
def test_who_decides_by_the_mode(make: Callable[[], nn.Module], decides: bool) -> None:
    assert decides_by_mode(make()) is decides


class Shuffled(nn.Module):
    """While it trains it shuffles its channels, and there alone are numbers that must follow their count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.training:
            y = y.view(-1, 4, 4).mul(torch.rand(4, 1)).view(-1, 16)
        return self.b(y)


def test_numbers_that_only_training_uses() -> None:
    torch.manual_seed(0)
    model = Shuffled().eval()
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert small.a.out_features == 8
    for graph in (None, surgery.graph, surgery.runs):
        proof = surgeon.verify(model, small, plan, X, graph=graph)
        assert {*proof.errors} == {"output", "output in training mode"}
    assert small.train()(X).shape == (4, 3)


class Mixed(nn.Module):
    """In eval mode the second layer takes the mean over channels, so that it shows nothing of which of them
    are which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(6, 8), nn.Parameter(torch.randn(8)), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        if self.training:
            y = y * self.scale
        return self.b(y.mean(1, keepdim=True)) + self.scale.sum()


def test_wrong_cuts_that_only_training_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    tried = 0
    for wrong, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, X)
        tried += 1
    assert tried == 3
    monkeypatch.setattr(sys.modules["surgeon.proof.verify"], "decides_by_mode", lambda model: False)
    surgeon.verify(model, wrong, bad, X)  # the last is one of the scale: eval mode takes it for right


def test_weights_that_training_bounds_come_back() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.a.weight.data.clamp_(-0.01, 0.01)
            return self.b(self.norm(self.a(x)))

    model = Bounded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5)
    small = plan.apply(model)
    cut = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    surgeon.verify(model, small, plan, X)
    assert len(surgery.runs) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, cut[name]) for name, tensor in small.state_dict().items())


def test_a_training_run_that_fails_is_said() -> None:
    class Targets(Decides):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return self.b(self.a(x))

    surgery = surgeon.inspect(Targets(), X)
    assert len(surgery.runs) == 1
    assert any(
        "only eval mode was seen" in remark and "targets are missing" in remark for remark in surgery.remarks
    )
    surgeon.shrink(Targets(), 0.5, example_inputs=X)
