"""One number of the code that serves several layers: whatever is asked for, they get one width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import MendError


class Gated(nn.Module):
    """Layers of gates whose halves are found by one number (van den Oord et al., WaveNet, 2016)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hidden = how, 16
        self.first, self.last = nn.Conv1d(4, 16, 1), nn.Conv1d(16, 2, 1)
        self.inner = nn.ModuleList(nn.Conv1d(16, 32, 3, padding=1) for _ in range(3))
        self.outer = nn.ModuleList(nn.Conv1d(16, 32, 1) for _ in range(3))

    def halves(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how == "attribute":
            return x[:, : self.hidden], x[:, self.hidden :]
        return x[:, :16], x[:, 16:]

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):  # no code that torch.fx traces
            raise ValueError("no numbers")
        x = self.first(x)
        out = torch.zeros_like(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            value, gate = self.halves(inner(x))
            more, skipped = self.halves(outer(value.tanh() * gate.sigmoid()))
            x, out = x + more, out + skipped
        return self.last(out)


REQUESTS: dict[str, dict[str, Any]] = {
    "macs": {"macs": 0.5},
    "global": {"ratio": 0.5, "scope": "global"},
    "knapsack": {"params": 0.5, "scope": "knapsack"},
    "by name": {"ratio": {"*": 0.5, "inner.1": 0.25}},
}


@pytest.mark.parametrize("how", ["attribute", "literal"])
@pytest.mark.parametrize("asked", REQUESTS)
def test_one_number_for_several_layers(asked: str, how: str) -> None:
    torch.manual_seed(0)
    model, x = Gated(how).eval(), torch.randn(2, 4, 12)
    with torch.no_grad():  # unlike scores: a global choice would give unlike widths
        for factor, layer in enumerate(model.inner, 1):
            layer.weight *= factor
    small = surgeon.shrink(model, example_inputs=x, round_to=1, **REQUESTS[asked])
    assert {layer.out_channels for layer in small.inner} == {2 * small.first.out_channels}
    assert small.first.out_channels < 16


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_does_not_hang_on_those_before_it(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Gated("attribute").eval(), torch.randn(2, 4, 12)
    surgery, fresh = surgeon.inspect(model, x), surgeon.inspect(model, x)
    surgery.plan(0.7, scope="global", round_to=1)
    assert surgery.links == fresh.links
    assert (
        surgery.plan(0.5, scope="global", round_to=1).kept == fresh.plan(0.5, scope="global", round_to=1).kept
    )


class Many(nn.Module):
    """A hundred numbers that equal the width, of which one is the width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        for place in range(100):
            setattr(self, f"number{place}", 16)
        self.width = 16

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(-1, self.width).relu())


def test_of_many_equal_numbers_the_one_that_is_read_is_tried_first() -> None:
    model = nn.Sequential(nn.Linear(6, 16), Many(), Many(), nn.Linear(16, 3)).eval()
    small = surgeon.shrink(model, 0.5, example_inputs=torch.randn(2, 6), round_to=1)
    assert small[1].width == small[2].width == 8


WIDTHS = [16]


class Unmendable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("no numbers")
        return self.last(self.first(x).view(-1, WIDTHS[-1]))


def test_where_no_link_helps_the_error_is_that_of_the_code() -> None:
    with pytest.raises(MendError, match="16 should be 8"):
        surgeon.shrink(Unmendable().eval(), 0.5, example_inputs=torch.randn(2, 6), round_to=1)
