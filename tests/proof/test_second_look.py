"""Weights of zeros hide which channels they read; values that reach nothing hide all that they are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrong import wrong_cuts

import surgeon
from surgeon.errors import ProofError, ProofWarning
from surgeon.proof.second_look import filled, hides

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Module):
    """A layer with a second one of low rank beside it that starts at zero (LoRA; Hu et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.down, self.up = nn.Linear(6, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) + self.up(self.down(x))))


class ZeroLayer(nn.Module):
    """A branch behind a layer of zeros (ControlNet; Zhang et al., 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.branch, self.zero, self.b = (nn.Linear(*s) for s in ((6, 8), (6, 8), (8, 8), (8, 3)))
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.zero(F.silu(self.branch(x))))


class ZeroColumns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.b.weight[:, ::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class ZeroScale(nn.Module):
    """A residual branch whose scale by channel starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.branch, self.b = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.scale * torch.tanh(self.branch(x)))


@pytest.mark.parametrize("kind", [LowRank, ZeroLayer, ZeroColumns, ZeroScale])
def test_wrong_cuts_in_front_of_zeros_are_found(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1, criterion="random")
    proof = surgeon.verify(model, plan.apply(model), plan, X)
    assert proof.error < 1e-12 and not proof.hidden and not proof.unread
    tried = 0
    for wrong, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, X)
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize(("kind", "wanted"), [(LowRank, True), (ZeroScale, True), (ZeroColumns, False)])
def test_only_zeros_that_multiply_ask_for_a_second_run(kind: type[nn.Module], wanted: bool) -> None:
    """A fresh bias is zero as well: what is absent of it is absent of the sum, whatever its numbers are."""
    model = kind().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        if not wanted:
            model.b.weight.fill_(0.5)
    graph = surgeon.inspect(model, X).graph
    fill = filled(model, ())
    assert {"a.bias", "b.bias"} <= set(fill)
    assert hides(graph, fill) is wanted


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).clamp(50, 60))


def test_channels_that_carry_one_number_are_counted_by_name() -> None:
    model = Clamped().eval()
    with pytest.warns(ProofWarning, match=r"4 channels .*clamp"):
        small = surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
    assert small.a.out_features == 4


class Writes(nn.Module):
    """What it writes into a buffer, and a product that it computes, nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("seen", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.seen.copy_(x.mean(0))
        x * self.scale
        return self.b(torch.tanh(x))


def test_tensors_that_reach_nothing_are_named() -> None:
    torch.manual_seed(0)
    model = Writes().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    seen = model.seen.clone()
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, X)
    assert proof.unread == ("scale", "seen") and "scale, seen" in str(proof)
    assert torch.equal(model.seen, seen) and torch.equal(small.seen, seen[plan.kept["seen"][0]])
    with pytest.warns(ProofWarning, match="scale, seen"):
        surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
