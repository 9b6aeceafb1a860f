"""What torch does not record: values that leave it, ops that write, operators that take functions, transforms."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention

import surgeon

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Three(nn.Module):
    """Three linear layers, put together by `forward`."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.bias, self.run = nn.Parameter(torch.randn(4)), forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def widths(model: nn.Module, inputs: Any = X) -> tuple[int, int, surgeon.Surgery]:
    """Outputs of the first two layers after a proved cut by half."""
    surgery = surgeon.inspect(model.eval(), inputs)
    plan = surgery.plan(0.5, round_to=1)
    small: Any = plan.apply(model)
    surgeon.verify(model, small, plan, graph=surgery.runs)
    surgeon.verify(model, small, plan, inputs)
    return small.a.out_features, small.b.out_features, surgery


def body(model: Any, x: Tensor) -> Tensor:
    out: Tensor = model.c(model.b(model.a(x)).relu())
    return out


@pytest.mark.parametrize(
    ("forward", "first", "second"),
    [
        (lambda s, x: (body(s, x), s.a(x).numpy()), 32, 8),
        (lambda s, x: (body(s, x), {"rows": s.a(x).tolist()}), 32, 8),
        (lambda s, x: body(s, x).tolist(), 16, 8),
        (lambda s, x: body(s, x).detach().cpu().numpy(), 16, 8),
        (lambda s, x: body(s, x) / float(np.linalg.norm(s.a(x).numpy())), 32, 8),
        (lambda s, x: s.c(torch.from_numpy(np.asarray(s.b(s.a(x))) * 2).relu()), 16, 16),
        (lambda s, x: s.c(torch.tensor(s.b(s.a(x)).tolist())), 16, 16),
        (lambda s, x: body(s, x)[torch.from_numpy(np.argsort(s.b(s.a(x))[:, 0].numpy()).copy())], 16, 16),
    ],
    ids=[
        "array",
        "lists",
        "only lists",
        "only an array",
        "a norm",
        "through numpy",
        "through a list",
        "an order",
    ],
)
def test_what_leaves_torch_stays_whole(forward: Any, first: int, second: int) -> None:
    model = Three(forward)
    a, b, surgery = widths(model)
    assert (a, b) == (first, second)
    reasons = [item.reason for item in surgery.frozen if "leaves torch by" in item.reason]
    assert all("test_outside_torch.py" in reason for reason in reasons)
    assert reasons or "order" in str(forward) or (first, second) == (16, 16)


def test_reads_are_compared() -> None:
    model = Three(lambda s, x: (body(s, x), s.a(x).numpy()))
    surgery = surgeon.inspect(model.eval(), X)
    plan = surgery.plan(0.5, round_to=1)
    proof = surgeon.verify(model, plan.apply(model), plan, graph=surgery.runs)
    assert any(path.startswith("values read by numpy") for path in proof.errors)


@torch.library.custom_op("outside::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


@torch.library.custom_op("outside::both", mutates_args={"x", "y"})
def both(x: Tensor, y: Tensor, by: float) -> Tensor:
    x.add_(by)
    y.mul_(by)
    return x * y.sum()


def bumps_all(s: Any, x: Tensor) -> Tensor:
    y = s.b(s.a(x)).clone()
    bump(y)
    return s.c(y)


def bumps_a_part(s: Any, x: Tensor) -> Tensor:
    y = s.b(s.a(x)).relu()
    out = s.c(y)
    bump(out[:, :2])
    return out * 2


def writes_two(s: Any, x: Tensor) -> Tensor:
    out, y = s.c(s.b(s.a(x)).relu()), torch.ones(3)
    return both(out, y, 2.0) + out + y.sum()


def writes_out(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    out = torch.empty_like(h)
    torch.mul(h, 2, out=out)
    return s.c(s.b(out.relu_()))


@pytest.mark.parametrize(
    ("forward", "second"), [(bumps_all, 16), (bumps_a_part, 8), (writes_two, 8), (writes_out, 8)]
)
def test_ops_that_write_freeze_only_what_they_touch(forward: Any, second: int) -> None:
    assert widths(Three(forward))[:2] == (16, second)


def attends(s: Any, x: Tensor) -> Tensor:
    y = s.a(x.reshape(1, 5, 6)).reshape(1, 5, 4, 8).transpose(1, 2)
    y = flex_attention(y, y, y, score_mod=lambda score, b, h, i, j: score + s.bias[h])
    return s.c(s.b(y.transpose(1, 2).reshape(1, 5, 32)))


@pytest.mark.parametrize(
    ("forward", "first", "second"),
    [
        (lambda s, x: torch.cond(x.sum() > 0, lambda h: body(s, h), lambda h: -body(s, h), (x,)), 16, 8),
        (
            lambda s, x: s.c(while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, h.tanh()), (torch.tensor(0), s.b(s.a(x))))[1]),
            16,
            8,
        ),
        (lambda s, x: torch.vmap(lambda row: body(s, row))(x), 16, 8),
        (lambda s, x: torch.compile(lambda row: body(s, row))(x), 16, 8),
        (lambda s, x: s.c(associative_scan(torch.add, s.b(s.a(x)), dim=0, combine_mode="generic")), 16, 16),
        (attends, 32, 8),
    ],
    ids=["cond", "while_loop", "vmap", "compile", "scan", "flex_attention"],
)  # fmt: skip
def test_operators_that_take_functions(forward: Any, first: int, second: int) -> None:
    compiles = torch.compile
    assert widths(Three(forward).requires_grad_(False))[:2] == (first, second)
    assert torch.compile is compiles
    gc.collect()


def test_a_branch_of_cond_that_was_not_taken_is_said() -> None:
    model = Three(
        lambda s, x: torch.cond(x.sum() > 0, lambda h: body(s, h), lambda h: body(s, h.flip(1)), (x,))
    )
    assert any(
        "decided by a value" in path for path in surgeon.inspect(model.requires_grad_(False), X).unseen
    )


@pytest.mark.parametrize("activation", [F.silu, torch.tanh, F.gelu, F.softplus, F.elu, torch.sigmoid, F.mish])
def test_forces_by_autograd(activation: Callable[[Tensor], Tensor]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_(True)
            energy = s.c(activation(s.b(activation(s.a(place))))).sum()
            return torch.autograd.grad(energy, place)[0].detach()

    assert widths(Three(forward))[:2] == (16, 8)
