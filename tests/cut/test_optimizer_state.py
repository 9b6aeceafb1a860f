"""plan.apply(model, optimizer=...): the optimizer goes on with the small model, its state sliced like the
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from motifs import Tied
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

import surgeon
from surgeon.errors import InputError, PlanError

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.n(self.a(x)).relu()).relu().flatten(1))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with their own settings; the first convolution's bias is not trained at all."""
    head = [p for n, p in model.named_parameters() if n.startswith("head")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("head") and n != "a.bias"]
    return [{"params": rest, "lr": 1e-2}, {"params": head, "lr": 1e-3, "weight_decay": 0.1}]


OPTIMIZERS = {
    "sgd": lambda model: SGD(groups(model), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda model: Adam(groups(model), amsgrad=True),
    "adamw": lambda model: AdamW(groups(model)),
}


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def sliced(tensor: Tensor, kept: dict[int, list[int]]) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor[(slice(None),) * dim + (index,)]
    return tensor


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_next_step_is_that_of_the_slices(
    model: nn.Module, make: Callable[[nn.Module], Optimizer]
) -> None:
    """With given gradients, a step of the small model is the slice of the step that the whole model takes
    with them.
    """
    optimizer = make(model)
    trained(model, optimizer)
    plan = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    states = {
        n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters() if p in optimizer.state
    }

    twin = copy.deepcopy(model)
    whole = make(twin)
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = plan.apply(model, optimizer=optimizer)

    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    named = dict(small.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for n, p in named.items() if n != "a.bias"
    }
    assert any(key != "step" for state in states.values() for key in state)
    for name, state in states.items():
        assert set(optimizer.state[named[name]]) == set(state)
        for key, value in state.items():
            want = sliced(value, plan.kept.get(name, {})) if value.dim() else value
            assert torch.equal(optimizer.state[named[name]][key], want), (name, key)

    for name, parameter in twin.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        named[name].grad = sliced(parameter.grad, plan.kept.get(name, {}))
    whole.step()
    optimizer.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(named[name], sliced(parameter, plan.kept.get(name, {}))), name
    trained(small, optimizer, 1)  # and it trains on


def test_the_users_loop_goes_on(model: nn.Module) -> None:
    """The optimizer object stays, so that its schedule does; the old model is no longer stepped."""
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trained(model, optimizer, 1)
    schedule.step()
    small = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1).apply(model, optimizer=optimizer)
    whole = copy.deepcopy(model.state_dict())
    cut = copy.deepcopy(small.state_dict())
    trained(small, optimizer, 1)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert not torch.equal(small.a.weight, cut["a.weight"])


def test_tied_weights() -> None:
    torch.manual_seed(0)
    model = Tied()
    x = torch.randn(2, 5)
    optimizer = Adam(model.parameters())
    nn.functional.mse_loss(model(x), torch.zeros_like(model(x))).backward()
    optimizer.step()
    mean = optimizer.state[model.a.weight]["exp_avg"].clone()
    plan = surgeon.inspect(model, x).plan(0.5, round_to=1)
    small = plan.apply(model, optimizer=optimizer)
    kept = plan.kept["a.weight"] if "a.weight" in plan.kept else plan.kept["b.weight"]
    assert len(kept) == 2
    assert torch.equal(optimizer.state[small.b.weight]["exp_avg"], sliced(mean, kept))
    assert (
        len(list(small.parameters()))
        == len(list(model.parameters()))
        == len(optimizer.param_groups[0]["params"])
    )
    for parameter in small.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert set(optimizer.state) == set(small.parameters())


def test_before_the_first_step(model: nn.Module) -> None:
    optimizer = Adam(model.parameters())
    small = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1).apply(model, optimizer=optimizer)
    assert not optimizer.state
    trained(small, optimizer, 1)


def test_foreign_parameters_are_refused_by_name(model: nn.Module) -> None:
    loss_weight = nn.Parameter(torch.zeros(7))
    named = [{"params": list(model.named_parameters())}, {"params": [("balance", loss_weight)]}]
    optimizer = SGD(named, lr=0.1)
    plan = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1)
    with pytest.raises(
        InputError, match=r"holds 1 parameters(?s:.*)group 1, parameter 0 .balance. of shape \(7,\)"
    ):
        plan.apply(model, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is model.a.weight  # nothing was changed


def test_state_that_cannot_be_sliced_is_refused(model: nn.Module) -> None:
    optimizer = Adafactor(model.parameters())
    trained(model, optimizer, 1)
    plan = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1)
    with pytest.raises(InputError, match=r"state '(row|col)_var' of Adafactor(?s:.*)a.weight"):
        plan.apply(model, optimizer=optimizer)


def test_nothing_changes_if_the_plan_does_not_fit(model: nn.Module) -> None:
    plan = surgeon.inspect(model, X[:1]).plan(0.5, round_to=1)
    small = plan.apply(model)
    optimizer = SGD(small.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="another architecture"):
        plan.apply(small, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"] == list(small.parameters())
