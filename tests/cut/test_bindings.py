"""What still leads to a part of the original is found; what `apply` gives is right without any proof."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import CopyError, MendError
from surgeon.graph.copying.model_copy import check_apart

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.extra: object = None

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def wrapped(model: Net) -> None:
    old = model.forward
    model.forward = lambda x: old(x) * 2  # type: ignore[method-assign]  # what some libraries do


def hooked(model: Net) -> None:
    model.a.register_forward_hook(lambda module, args, output: output + model.a.bias)


def partial(model: Net) -> None:
    model.extra = [functools.partial(torch.add, model.b.weight)]


def view(model: Net) -> None:
    bias = model.a.bias.detach()[:2]
    model.extra = lambda: bias


def weak(model: Net) -> None:
    model.extra = {"last": weakref.ref(model.b)}


@pytest.mark.parametrize("bind", [wrapped, hooked, partial, view, weak])
def test_parts_of_the_original_are_found(bind: Callable[[Net], None]) -> None:
    model = Net().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    check_apart(model, small)
    other = Net().eval()
    bind(other)
    small.__dict__.update({k: v for k, v in vars(other).items() if k in ("forward", "extra")})
    small.a._forward_hooks.update(other.a._forward_hooks)
    with pytest.raises(CopyError, match="of the original"):
        check_apart(other, small)


def test_apply_refuses_a_view_of_the_original_in_a_closure() -> None:
    model = Net().eval()
    view(model)
    with pytest.raises(CopyError, match="bias"):
        surgeon.inspect(model, X).plan(0.5, round_to=1)


class Constant(nn.Module):
    """Its code makes a tensor that is as long as a width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.tensor([1.0] * 8))


class Cropped(nn.Module):
    """A pad with a negative number takes channels away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.pad(self.a(x), (-1, -1)))


@pytest.mark.parametrize("kind", [Constant, Cropped])
def test_what_apply_gives_runs_and_is_right_or_is_refused(kind: type[nn.Module]) -> None:
    model = kind().eval()
    surgery = surgeon.inspect(model, X)
    try:
        plan = surgery.plan(0.5, round_to=1)
    except MendError:
        return
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, X).error < 1e-12
