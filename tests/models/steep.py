"""A network whose gains carry a difference in the last bit far."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Steep(nn.Module):
    """Residual blocks, each of which multiplies differences."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.sin(layer(x))
        return self.last(x)
