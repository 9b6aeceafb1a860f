"""Outputs that are no numbers: after the cut alone, or in the original as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ProofError


class Divided(nn.Module):
    """Channels divided by their spread, of which one output is made; the other one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.cat([self.last(y / y.std(-1, keepdim=True)), self.other(y)], -1)


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def test_a_spread_of_one_channel_is_refused_and_the_op_is_named() -> None:
    with pytest.raises(ProofError, match=r"(?s)is no number.*aten.std.*min_channels=2"):
        surgeon.shrink(Divided().eval(), 0.95, example_inputs=X, round_to=1)
    small = surgeon.shrink(Divided().eval(), 0.95, example_inputs=X, round_to=1, min_channels=2)
    assert small.first.out_features == 2


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) / 0


def test_an_original_that_gives_no_numbers_says_so() -> None:
    with pytest.raises(ProofError, match="overflows in the original as well"):
        surgeon.shrink(Overflows().eval(), 0.5, example_inputs=X, round_to=1)
