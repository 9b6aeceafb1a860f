"""Pruning in steps by a schedule, down to an accuracy floor; and how sensitive each group is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.api.iterate import SCHEDULES
from surgeon.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 30, 3, padding=1), nn.BatchNorm2d(30), nn.Conv2d(30, 50, 1)
        self.head = nn.Linear(50, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.n(self.a(x)).relu()).relu().mean((2, 3)))


X = torch.randn(4, 3, 6, 6)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize(
    ("name", "start", "middle"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.1, 0.5),
        ("cubic", 1 - 0.9**3, 0.875),
        ("exponential", (1 - math.exp(-0.5)) / (1 - math.exp(-5)), 1 / (1 + math.exp(-2.5))),
        ("sinusoidal", math.sin(math.pi / 20) ** 2, 0.5),
    ],
)
def test_schedules_against_closed_forms(name: str, start: float, middle: float) -> None:
    schedule = SCHEDULES[name]
    assert (schedule(0.1), schedule(0.5), schedule(1.0)) == pytest.approx((start, middle, 1.0))


@pytest.mark.parametrize("schedule", ["cubic", "linear", lambda t: t**2])
def test_widths_follow_the_schedule(model: Net, schedule: Any) -> None:
    """No rounding adds up: after each step every group has what its first width asks for."""
    rule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    run = surgeon.iterate(model, 0.7, steps=7, schedule=schedule, example_inputs=X, round_to=1)
    seen = []
    for step in run:
        kept = 1 - 0.7 * rule(step.number / 7)
        assert abs(step.model.a.out_channels - 30 * kept) <= 0.5 + 1e-9
        assert abs(step.model.b.out_channels - 50 * kept) <= 0.5 + 1e-9
        with torch.no_grad():
            step.model.a.weight.mul_(1.01)  # the caller trains
        seen.append(step.number)
    assert seen == list(range(1, 8))
    assert (run.model.a.out_channels, run.model.b.out_channels) == (9, 15)
    assert (model.a.out_channels, run.stopped) == (30, "")
    assert [step.share for step in run.steps] == [pytest.approx(rule(i / 7)) for i in range(1, 8)]


def test_training_in_between_is_kept(model: Net) -> None:
    run = surgeon.iterate(model, 0.5, steps=2, example_inputs=X, round_to=1)
    for step in run:
        with torch.no_grad():
            step.model.head.bias.fill_(float(step.number))
    assert run.model.head.bias.tolist() == [2.0] * 5


def test_budgets_in_steps(model: Net) -> None:
    whole = surgeon.inspect(model, X)
    run = surgeon.iterate(
        model, macs=0.3, params=0.5, steps=3, schedule="linear", scope="global", example_inputs=X, round_to=1
    )
    shares = [step.plan.macs / whole.macs for step in run]
    for share, number in zip(shares, (1, 2, 3), strict=True):
        assert share <= 1 - 0.7 * number / 3 + 1e-9
    assert shares[2] > 0.2
    assert run.steps[-1].plan.params <= 0.5 * whole.params


def test_the_floor_gives_the_last_model_that_met_it(model: Net) -> None:
    scores = iter([0.95, 0.93, 0.89, 0.99])
    trained = []
    run = surgeon.iterate(
        model,
        0.8,
        steps=6,
        schedule="linear",
        score=lambda m: next(scores),
        floor=0.9,
        example_inputs=X,
        round_to=1,
    )
    for step in run:
        trained.append(step.model)
    assert len(trained) == 3
    assert run.model is trained[1]
    assert [step.score for step in run.steps] == [0.95, 0.93, 0.89]
    assert "step 3 has score 0.89, below the floor 0.9" in run.stopped
    with pytest.raises(InputError, match="already taken"):
        next(iter(run))


def test_no_step_met_the_floor(model: Net) -> None:
    run = surgeon.iterate(model, 0.8, steps=3, score=lambda m: math.nan, floor=0.9, example_inputs=X)
    assert len(list(run)) == 1
    assert run.model is model


def test_it_ends_where_nothing_more_can_leave(model: Net) -> None:
    run = surgeon.iterate(model, params=0.001, steps=4, schedule="linear", example_inputs=X, round_to=1)
    assert 0 < len(list(run)) < 4
    assert "cannot be reached" in run.stopped


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "square"}, "constant, linear, cubic, exponential, sinusoidal"),
        ({"steps": 0}, "steps must be"),
        ({"floor": 0.9}, "a floor needs a score"),
        ({"macs": 0.5}, "either a ratio or budgets"),
        ({"latency": 0.5}, "latency cannot be reached in steps"),
    ],
)
def test_bad_input(model: Net, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        surgeon.iterate(model, 0.5, example_inputs=X, **options)
    with pytest.raises(InputError, match="a share in"):
        list(surgeon.iterate(model, 0.5, example_inputs=X, schedule=lambda t: 2.0))


# -- sensitivity ---------------------------------------------------------------------------------------------


def test_sensitivity_is_what_a_cut_changes(model: Net) -> None:
    surgery = surgeon.inspect(model, X)
    found = surgery.sensitivity([X, 2 * X], ratios=(0.2, 0.6))
    assert found.names == {"a.weight[0]": ("a.weight", "a.bias", "n.weight", "n.bias", "n.running_mean", "n.running_var"),
                           "b.weight[0]": ("b.weight", "b.bias")}  # fmt: skip
    small = surgery.plan({"b": 0.6, "a": 0.0}, round_to=1).apply(model)
    with torch.no_grad():
        old, new = torch.cat([model(X), model(2 * X)]).double(), torch.cat([small(X), small(2 * X)]).double()
    assert found.changes["b.weight[0]"][1] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
    for changes in found.changes.values():
        assert 0 < changes[0] < changes[1]
    limit = found.changes["b.weight[0]"][0] * 1.001
    assert found.within(limit)["b.weight"] == 0.2
    assert found.within(0.0) == dict.fromkeys([*found.names["a.weight[0]"], *found.names["b.weight[0]"]], 0.0)
    assert "b.weight[0]" in str(found)
    surgery.plan(found.within(limit), round_to=1)


def test_sensitivity_of_a_loss_in_processes(model: Net, tmp_path: Path) -> None:
    targets = torch.randint(0, 5, (4,))
    found = surgeon.inspect(model, X).sensitivity(
        [(X, targets)], loss=nn.functional.cross_entropy, ratios=(0.5,), n_jobs=2
    )
    small = surgeon.inspect(model, X).plan({"a": 0.5}, round_to=1).apply(model)
    with torch.no_grad():
        want = nn.functional.cross_entropy(small(X), targets) - nn.functional.cross_entropy(model(X), targets)
    assert found.changes["a.weight[0]"][0] == pytest.approx(float(want), abs=1e-6)
    assert found.what == "loss"
    found.plot(tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().count("<path") > 4


def test_sensitivity_refuses(model: Net) -> None:
    surgery = surgeon.inspect(model, X)
    with pytest.raises(InputError, match="shares in"):
        surgery.sensitivity(ratios=(0.5, 1.5))
    with pytest.raises(InputError, match="a loss needs data"):
        surgery.sensitivity(loss=nn.functional.cross_entropy)
