"""Every regulariser against a direct computation; the gradient in place against autograd; gates against a
real cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from motifs import MOTIFS, Motif, SeparateQKV
from test_motifs import prepared
from torch import Tensor, nn

import surgeon
from surgeon.coupling.groups import Group
from surgeon.errors import InputError
from surgeon.graph.tensors import tensor_leaves
from surgeon.training import Gates, Regularizer

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Channels of b are four entries each of the head's input; a residual addition ties b and c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 5, 3), nn.Conv2d(5, 5, 1, bias=False)
        self.head = nn.Linear(5 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.n(self.a(x)).relu())
        return self.head((y + self.c(y)).relu().flatten(1))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(-1, 1)
        model.n.running_var.abs_().add_(0.5)
    return model


def units(model: Any) -> list[list[Tensor]]:
    """What leaves with each unit, written down by hand: six of a, five of the sum of b and c."""
    found = [
        [model.a.weight[u], model.a.bias[u], model.n.weight[u], model.n.bias[u], model.b.weight[:, u]]
        for u in range(6)
    ]
    for u in range(5):
        rows = [model.b.weight[u], model.b.bias[u], model.c.weight[u]]
        found.append([*rows, model.c.weight[:, u], model.head.weight[:, 4 * u : 4 * u + 4]])
    return found


def flat(unit: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in unit])


def surgery_of(model: nn.Module, x: Tensor = X.double()) -> surgeon.Surgery:  # noqa: B008  # it is not changed
    return surgeon.inspect(model.eval(), x)


def removed(plan: surgeon.Plan) -> list[int]:
    """Numbers of units, as `units` counts them, that a plan takes."""
    a, b = plan.kept["a.weight"][0], plan.kept["b.weight"][0]
    return [u for u in range(6) if u not in a] + [6 + u for u in range(5) if u not in b]


DIRECT: dict[str, Callable[[Any, surgeon.Plan], Tensor]] = {
    "l1": lambda model, plan: sum(flat(unit).abs().sum() for unit in units(model)),
    "group_lasso": lambda model, plan: sum(flat(unit).norm() for unit in units(model)),
    "bn_scale": lambda model, plan: model.n.weight.abs().sum(),
    "growing": lambda model, plan: sum(flat(units(model)[u]).square().sum() for u in removed(plan)) / 2,
}


@pytest.mark.parametrize("kind", DIRECT)
def test_against_a_direct_computation(model: Any, kind: str) -> None:
    """The value, its gradient, and the gradient that step() adds to what is there."""
    surgery = surgery_of(model)
    plan = surgery.plan(0.4, round_to=1)
    reg = surgeon.regularizer(surgery, kind, 0.3, plan=plan if kind == "growing" else None)
    want = 0.3 * DIRECT[kind](model, plan)
    torch.testing.assert_close(reg(), want, rtol=1e-12, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(want, parameters, allow_unused=True)
    assert any(g is not None for g in gradients)

    reg().backward()
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-14, msg=name)
    model.zero_grad()
    for parameter in parameters[:3]:  # a gradient of the loss is there: the penalty's is added
        parameter.grad = torch.full_like(parameter, 7.0)
    held = parameters[0].grad
    reg.step()
    for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient is None:
            assert parameter.grad is None or bool((parameter.grad == 7).all())
        else:
            torch.testing.assert_close(
                parameter.grad, gradient + (7.0 if place < 3 else 0), rtol=1e-10, atol=1e-14
            )
    assert parameters[0].grad is held  # in place


def test_group_lasso_of_a_unit_that_is_zero(model: Any) -> None:
    """A unit that has vanished has gradient 0, not NaN."""
    reg = surgeon.regularizer(surgery_of(model), "group_lasso", 1.0)
    with torch.no_grad():
        for part in units(model)[2]:
            part.zero_()
    reg.step()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert bool((model.a.weight.grad[2] == 0).all()) and bool((model.a.weight.grad[1] != 0).all())


def test_the_growing_level(model: Any) -> None:
    surgery = surgery_of(model)
    plan = surgery.plan(0.4, round_to=1)
    reg: Any = surgeon.regularizer(surgery, "growing", 0.1, plan=plan, every=3, ceiling=0.25)
    seen = []
    for _ in range(8):
        seen.append(reg.level)
        reg.step()
    assert seen == pytest.approx([0.1] * 3 + [0.2] * 3 + [0.25] * 2)
    again: Any = surgeon.regularizer(surgery, "growing", 0.1, plan=plan, every=3, ceiling=0.25)
    again.load_state_dict(reg.state_dict())
    assert again.level == 0.25 and int(again.steps) == 8


def test_growing_empties_what_the_plan_takes(model: Any) -> None:
    """Once the level is high the plan's units are all but gone, the rest is not, and the cut changes
    nothing.
    """
    surgery = surgery_of(model)
    plan = surgery.plan(0.4, round_to=1)
    reg = surgeon.regularizer(surgery, "growing", 0.05, plan=plan, every=2, ceiling=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        reg.step()
        optimizer.step()
    sizes = [flat(unit).norm().item() for unit in units(model)]
    gone = removed(plan)
    assert max(sizes[u] for u in gone) < 1e-6 < 0.1 < min(s for u, s in enumerate(sizes) if u not in gone)
    torch.testing.assert_close(plan.apply(model)(X.double()), model(X.double()), rtol=1e-6, atol=1e-6)


# -- gates ---------------------------------------------------------------------------------------------------


def gates_of(model: nn.Module, x: Tensor | None = None, **options: Any) -> tuple[surgeon.Surgery, Gates]:
    surgery = surgery_of(model) if x is None else surgery_of(model, x)
    reg = surgeon.regularizer(surgery, "l0", 0.3, **options)
    assert isinstance(reg, Gates)
    return surgery, reg


def test_the_penalty_is_the_probability_of_open_gates(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reg = gates_of(model, open_share=0.7)
    assert reg.log_alpha.shape == (11,)
    shift = 2 / 3 * math.log(0.1 / 1.1)
    want = 0.3 * torch.sigmoid(reg.log_alpha - shift).sum()
    torch.testing.assert_close(reg(), want)
    assert reg().item() == pytest.approx(0.3 * 11 * 0.7, rel=0.003)
    with torch.no_grad():
        reg.log_alpha.fill_(0.4)
    closed = 1 - float(torch.sigmoid(torch.tensor(0.4) - shift))
    for drawn, gates_open in ((closed - 1e-5, False), (closed + 1e-5, True)):  # of a uniform number
        monkeypatch.setattr(torch, "rand_like", partial(torch.full_like, fill_value=drawn))
        gates = reg.gates(drawn=True).detach()
        assert ((gates > 0) == gates_open).all() and (gates < 1e-3).all()
    monkeypatch.undo()
    torch.manual_seed(0)
    several = torch.stack([reg.gates(drawn=True) for _ in range(100)]).detach()
    assert float(several.max()) == 1 and float(several.min()) == 0


def test_gates_scale_what_is_read(model: Any) -> None:
    """In eval mode the output is that of weights whose columns were scaled by hand; the parameters stay what
    they are.
    """
    _, reg = gates_of(model)
    with torch.no_grad():
        reg.log_alpha.copy_(torch.linspace(-3, 3, 11))
    z = (torch.sigmoid(torch.linspace(-3, 3, 11)) * 1.2 - 0.1).clamp(0, 1).double()
    assert 0 < int((z == 0).sum()) < 5
    twin = Net().double().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.b.weight.mul_(z[:6].reshape(1, 6, 1, 1))
        twin.c.weight.mul_(z[6:].reshape(1, 5, 1, 1))
        twin.head.weight.mul_(z[6:].repeat_interleave(4))
    names = list(dict(model.named_parameters()))
    torch.testing.assert_close(model(X.double()), twin(X.double()))
    assert list(dict(model.named_parameters())) == names and isinstance(model.b.weight, nn.Parameter)
    reg.bake()
    torch.testing.assert_close(model.head.weight, twin.head.weight)
    torch.testing.assert_close(model(X.double()), twin(X.double()))


def test_gates_learn_and_the_cut_takes_what_they_closed(model: Any) -> None:
    """Through the loss and through the penalty; what is closed leaves, and the small model computes the
    same.
    """
    surgery, reg = gates_of(model)
    model.train()
    model(X.double()).square().sum().backward()
    assert reg.log_alpha.grad is not None and bool((reg.log_alpha.grad != 0).any())
    before = reg.log_alpha.grad.clone()
    penalty = torch.autograd.grad(reg(), reg.log_alpha)[0]
    reg.step()
    torch.testing.assert_close(reg.log_alpha.grad, before + penalty)

    model.eval()
    with torch.no_grad():
        reg.log_alpha.copy_(torch.tensor([9.0, -9, 9, 9, -9, 9, 9, -9, 9, 9, 9]))
    reg.bake()
    plan = surgery.plan(reg.ratios(), criterion=reg.scores, round_to=1)
    assert (plan.kept["a.weight"][0], plan.kept["b.weight"][0]) == ([0, 2, 3, 5], [0, 2, 3, 4])
    torch.testing.assert_close(plan.apply(model)(X.double()), model(X.double()))


def test_gates_take_part_in_an_exception(model: Any) -> None:
    """A forward that fails leaves the model with its own parameters."""
    _, reg = gates_of(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 2, 2, 2))
    assert isinstance(model.b.weight, nn.Parameter)
    reg.bake()


def test_gates_where_no_weight_reads() -> None:
    """Dims of queries are read by keys: that group is named, not gated; asked for, it is refused. Heads
    close.
    """
    torch.manual_seed(0)
    model = SeparateQKV().double().eval()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    surgery = surgeon.inspect(model, x)
    reg: Any = surgeon.regularizer(surgery, "l0", 0.1)
    assert [g.attention for g in reg.groups] == ["heads"]
    with pytest.raises(InputError, match="groups that weights alone read"):
        surgeon.regularizer(surgery, "l0", 0.1, groups=[reg.without[0]])
    with torch.no_grad():
        reg.log_alpha.copy_(torch.tensor([9.0, -9, 9, -9]))
    reg.bake()
    small = surgery.plan(reg.ratios(), criterion=reg.scores, heads="whole", round_to=1).apply(model)
    assert small.q.out_features == model.q.out_features // 2
    torch.testing.assert_close(small(x), model(x))


def closing_one_step(group: Group) -> Tensor:
    """Numbers for the gates of a group: one unit of every balanced set is closed."""
    found = torch.full((group.units,), 9.0)
    found[np.arange(group.units).reshape(group.sets.shape)[:, 0]] = -9
    return found


UNGATED = {
    "write_through_view": "no weight reads the channels",
    "layer_norm": "the norm counts closed units",
}


SHARED = (
    "grouped",
    "option_a",
    "channel_shuffle",
    "split_unequal",
    "heads_in_a_row",
)  # every group of these shares a layer with another one


@pytest.mark.parametrize("motif", [m for m in MOTIFS if m.name not in UNGATED], ids=lambda m: m.name)
def test_closed_gates_are_a_cut(motif: Motif) -> None:
    """Of each gated group in turn: the model with a step's gates closed and the small one without these units
    are equal.
    """
    model, x = prepared(motif)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    tested = 0
    for number in range(len(gates_of(copy.deepcopy(model), x)[1].groups)):
        twin = copy.deepcopy(model)
        surgery, reg = gates_of(twin, x)
        group = reg.groups[number]
        if any(
            set(group.producers) & set(other.producers)
            for other in surgery.groups
            if other is not group and not group.batched
        ):
            continue  # a ratio by layer cannot say which of the two loses
        closed = [closing_one_step(g) if g is group else torch.full((g.units,), 9.0) for g in reg.groups]
        with torch.no_grad():
            reg.log_alpha.copy_(torch.cat(closed))
        reg.bake()
        plan = surgery.plan(reg.ratios(), criterion=reg.scores, round_to=1)
        small = plan.apply(twin)
        with torch.no_grad():
            for (path, left), (_, right) in zip(tensor_leaves(twin(x)), tensor_leaves(small(x)), strict=True):
                torch.testing.assert_close(left, right, msg=f"{group.name} {path}")
        tested += 1
    assert tested or motif.name in SHARED


def test_scores_do_not_guess() -> None:
    """Groups of a grouped convolution have no gates, its channels have: a plan that might take the former is
    refused.
    """
    model, x = prepared(next(m for m in MOTIFS if m.name == "grouped"))
    surgery, reg = gates_of(model, x)
    rows = next(g for g in surgery.groups if g.name in reg.without)
    assert reg.scores(rows, {}).tolist() == [0.0] * 4  # nothing is closed
    with torch.no_grad():
        reg.log_alpha[0] = -9
    with pytest.raises(InputError, match="has no gates, but shares a layer"):
        reg.scores(rows, {})


# -- bad input -----------------------------------------------------------------------------------------------


def test_bad_input(model: Any) -> None:
    surgery = surgery_of(model)
    for arguments, words in [
        (("ridge", 0.1), "unknown regularizer 'ridge'(?s:.*)l1, group_lasso, bn_scale, growing, l0"),
        (("l1", -0.1), "strength(?s:.*)-0.1"),
        (("l1", float("nan")), "strength"),
        (("growing", 0.1), "plan=surgery.plan"),
    ]:
        with pytest.raises(InputError, match=words):
            surgeon.regularizer(surgery, *arguments)
    with pytest.raises(InputError, match="no group 'nowhere'"):
        surgeon.regularizer(surgery, "l1", 0.1, groups=["nowhere"])
    with pytest.raises(InputError, match="open_share"):
        surgeon.regularizer(surgery, "l0", 0.1, open_share=1.0)
    scaleless = [g for g in surgery.groups if "b.weight" in g.name]
    with pytest.raises(InputError, match="batch norm"):
        surgeon.regularizer(surgery, "bn_scale", 0.1, groups=scaleless)
    reg: Regularizer = surgeon.regularizer(surgery, "bn_scale", 0.1)
    assert reg.without == tuple(g.name for g in scaleless)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="takes gradients"):
        reg.step()
    other = surgeon.inspect(copy.deepcopy(model).float(), X)
    one = surgeon.regularizer(other, "l1", 1.0, groups=["a.weight[0]"])
    assert [g.name for g in one.groups] == ["a.weight[0]"]
