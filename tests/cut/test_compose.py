"""Several plans in one: what it leaves is what they leave one after another, weight by weight; and it is
proved like any plan.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from motifs import MOTIFS, Motif
from test_motifs import prepared
from torch import nn

import surgeon
from surgeon.api.surgery import Surgery
from surgeon.errors import BudgetError, InputError, PlanError
from surgeon.training import Features


def in_steps(
    model: nn.Module, x: torch.Tensor, count: int = 3
) -> tuple[Surgery, list[surgeon.Plan], nn.Module]:
    """Random plans one after another, each for what the one before it left, and what they leave."""
    first = surgeon.inspect(model, x)
    plans, small, surgery = [], model, first
    for seed in range(count):
        try:
            plans.append(surgery.plan(0.3, criterion="random", seed=seed, round_to=1))
        except BudgetError:  # nothing is left that may leave
            break
        small = plans[-1].apply(small)
        surgery = surgeon.inspect(small, x)
    return first, plans, small


@pytest.mark.parametrize("motif", MOTIFS, ids=lambda m: m.name)
def test_one_plan_leaves_what_several_leave(motif: Motif) -> None:
    model, x = prepared(motif)
    surgery, plans, small = in_steps(model, x)
    assert sum(bool(plan.kept) for plan in plans) > 1
    whole = surgery.compose(plans)
    once = whole.apply(model)
    expected = small.state_dict()
    assert list(once.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in once.state_dict().items())
    surgeon.verify(model, once, whole, x)
    assert (whole.macs, whole.params, whole.size) == (plans[-1].macs, plans[-1].params, plans[-1].size)
    assert (whole.macs_before, whole.params_before) == (plans[0].macs_before, plans[0].params_before)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))


X = torch.randn(4, 6)


def test_it_is_a_plan_like_others(tmp_path: Path) -> None:
    surgery, plans, small = in_steps(mlp(), X)
    whole = surgery.compose(plans)
    whole.save(tmp_path / "plan.json")
    again = surgeon.Plan.load(tmp_path / "plan.json").apply(mlp())
    assert torch.equal(again(X), small(X))
    assert whole.request["composed"] == [dict(plan.request) for plan in plans]
    assert surgery.compose(plans[:1]).kept == plans[0].kept


def test_recovery_aims_at_the_original() -> None:
    """Without a ReLU a refit can win all back, if it aims at the original rather than at what the first plan
    left.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 3))
    surgery, plans, small = in_steps(model, X, 2)
    assert len(plans) == 2
    assert small[0].out_features >= 6  # enough to carry everything
    data = [torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    done = surgeon.recover(small, surgery.compose(plans), model, data)
    assert done.before > 0.1
    assert done.after < 1e-5
    torch.testing.assert_close(done.model(X), model(X), rtol=1e-4, atol=1e-5)


def test_features_of_the_original() -> None:
    """The last model imitates the original on the channels that all plans left."""
    model = mlp()
    surgery, plans, small = in_steps(model, X)
    whole = surgery.compose(plans)
    features = Features(surgery, whole, ["0", "2"])
    kept = {path: dims[1].tolist() for path, dims in features.kept.items()}
    assert kept == {"0": whole.kept["0.weight"][0], "2": whole.kept["2.weight"][0]}
    with features.watching(small, model):
        model(X)
        small(X)
        loss = features.loss()
    first = model[0](X)[:, kept["0"]]
    second, theirs = small[2](torch.relu(first)), model[2](torch.relu(model[0](X)))[:, kept["2"]]
    expected = (second - theirs).square().mean() / theirs.square().mean()  # the first layer is as it was
    torch.testing.assert_close(loss, expected)


def test_plans_that_do_not_follow_one_another() -> None:
    surgery, plans, _ = in_steps(mlp(), X)
    with pytest.raises(PlanError, match="another architecture"):
        surgery.compose(plans[::-1])
    with pytest.raises(PlanError, match="another architecture"):
        surgery.compose([plans[0], plans[2]])
    with pytest.raises(InputError, match="no plan to compose"):
        surgery.compose([])


@pytest.mark.parametrize(
    ("kept", "where"),
    [
        ({"0.weight": {0: [*range(19)]}}, "0.weight"),  # its bias and its reader keep theirs
        ({"4.bias": {0: [0, 1]}}, "4.bias"),  # the model's outputs
    ],
)
def test_what_cannot_leave_is_refused(kept: dict[str, dict[int, list[int]]], where: str) -> None:
    model = mlp()
    surgery = surgeon.inspect(model, X)
    wrong = dataclasses.replace(surgery.plan(0.5), kept=kept)
    with pytest.raises(PlanError, match="cannot be one") as caught:
        surgery.compose([wrong])
    assert where in str(caught.value)


def test_iterate_says_all_that_left() -> None:
    model = mlp()
    scores = iter([0.9, 0.9, 0.1])
    run = surgeon.iterate(
        model,
        0.6,
        steps=4,
        schedule="linear",
        example_inputs=X,
        round_to=1,
        score=lambda _: next(scores),
        floor=0.5,
    )
    assert run.plan is None
    for step in run:
        with torch.no_grad():
            step.model[0].bias.add_(1)  # the caller trains
    assert run.plan is not None
    small = run.plan.apply(model)
    assert [p.shape for p in small.parameters()] == [
        p.shape for p in run.model.parameters()
    ]  # without the step that failed
    assert [step.plan.params for step in run.steps][1] == run.plan.params
    torch.testing.assert_close(small[0].bias + 2, run.model[0].bias)
