"""Sizes that ops are given and that must change with the cut."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon


class CutOffByPadding(nn.Module):
    """Entries are cut off at an end by a negative width, and read elsewhere."""

    def __init__(self, front: int) -> None:
        super().__init__()
        self.front = front
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(12, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        y = F.pad(z, (-4, 0)) if self.front else F.pad(z, (0, -4))
        return self.b(y) + self.c(z)


def test_negative_widths_of_padding_follow() -> None:
    for front in (0, 1):
        torch.manual_seed(0)
        model, x = CutOffByPadding(front).eval(), torch.randn(5, 6)
        small = surgeon.shrink(model, 0.5, example_inputs=x, round_to=1)
        assert (small.a.out_features, small.b.in_features, small.c.in_features) == (8, 6, 8)  # 2 are cut off
