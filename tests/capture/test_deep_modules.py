"""Modules in modules in modules: as deep as Python runs them, they are cut."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import surgeon


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_modules_that_are_nested_deep() -> None:
    model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for _ in range(250):
        model = Around(model)
    limit = sys.getrecursionlimit()
    small = surgeon.shrink(model.eval(), 0.5, example_inputs=torch.randn(2, 6), round_to=1)
    assert small.get_submodule("inner." * 250 + "0").out_features == 4
    assert sys.getrecursionlimit() == limit
