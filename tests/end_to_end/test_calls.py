"""What a surgery costs, counted so that it does not hang on the machine: Python functions called for each op of the
graph, by inspect, plan and apply together.

Budgets are some 10 % above what was counted when they were set. One that is exceeded says that work for each op, or
for each module, was added: make it cheaper, or raise the budget in the same change and say why. One that is far too
high is to be lowered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon

BLOCKS = 12


class Residual(nn.Module):
    """As in ResNets: two convolutions around a shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if out == width else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(self.pool(x)))))


class Inverted(nn.Module):
    """As in MobileNets: a wide depthwise convolution, squeezed and excited; some samples skip it in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU(inplace=True)),
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
                nn.BatchNorm2d(wide),
                nn.SiLU(inplace=True),
            ),
            Excite(wide),
            nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.training:
            y = y * torch.empty(len(x), 1, 1, 1).bernoulli_(0.8)
        return x + y


class Block(nn.Module):
    """As in vision transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(out)
        return x + self.mlp(self.norm2(x))


def residual() -> tuple[nn.Module, Tensor]:
    blocks = [Residual(8 if i < BLOCKS // 2 + 1 else 16, 8 if i < BLOCKS // 2 else 16) for i in range(BLOCKS)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Conv2d(16, 4, 1)), torch.randn(2, 3, 8, 8)


def inverted() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *(Inverted(8) for _ in range(BLOCKS)), nn.Conv2d(8, 4, 1)
    ), torch.randn(2, 3, 8, 8)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(5, 16), *(Block(16, 4) for _ in range(BLOCKS)), nn.LayerNorm(16), nn.Linear(16, 4)
    ), torch.randn(2, 6, 5)


def surgery(model: nn.Module, x: Tensor) -> int:
    """Cut a model; how many ops it has."""
    found = surgeon.inspect(model, x)
    found.plan(0.5, round_to=1).apply(model)
    return len(found.graph.calls)


def calls_per_op(make: Callable[[], tuple[nn.Module, Tensor]]) -> float:
    surgery(*make())  # what is imported and remembered once
    model, x = make()
    count = 0

    def called(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        ops = surgery(model.eval(), x)
    finally:
        sys.setprofile(before)
    return count / ops


@pytest.mark.parametrize(("make", "budget"), [(residual, 1300), (inverted, 2080), (transformer, 980)])
def test_a_surgery_calls_few_functions_an_op(
    make: Callable[[], tuple[nn.Module, Tensor]], budget: int
) -> None:
    found = calls_per_op(make)
    assert found <= budget, f"{found:.0f} functions an op, {budget} are the budget"
    assert found > 0.6 * budget, f"{found:.0f} functions an op: lower the budget of {budget}"
