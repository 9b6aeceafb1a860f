"""How much Python a cut runs: calls of functions, which do not depend on the machine, within a committed number.

A change that makes a cut slower by an algorithm shows here before any benchmark is run. If it has to be, measure
anew with `python tests/house/test_call_counts.py`, and say in the commit why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon

BUDGET = Path(__file__).with_name("calls.json")
ROOM = 1.05  # caches, versions of torch


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Squeezed(nn.Module):
    """An inverted residual with squeeze and excitation, stochastic depth behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width), nn.SiLU())
        self.depthwise = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.squeeze, self.excite = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, 4 * width, 1)
        self.project = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.project(y * scale)
        return x + (y * torch.rand(len(x), 1, 1, 1).round() if self.training else y)


def chain() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), *(Residual(16) for _ in range(20)), nn.Conv2d(16, 4, 1)
    ), torch.rand(1, 3, 8, 8)


def mobile() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), *(Squeezed(16) for _ in range(10)), nn.Conv2d(16, 4, 1)
    ), torch.rand(1, 3, 8, 8)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 6), nn.Linear(32, 4)), torch.rand(2, 5, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "chain": chain,
    "mobile": mobile,
    "transformer": transformer,
}


def counted(run: Callable[[], Any]) -> int:
    """Calls of Python functions while something runs."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def stages(name: str) -> dict[str, int]:
    """Calls of a cut and of its proof, after a first run that fills caches."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()

    def cut() -> Any:
        surgery = surgeon.inspect(model, x)
        plan = surgery.plan(0.5, round_to=1)
        return surgery, plan, plan.apply(model)

    surgery, plan, small = cut()
    surgeon.verify(model, small, plan, graph=surgery.graph)
    return {
        "cut": counted(cut),
        "proof": counted(lambda: surgeon.verify(model, small, plan, graph=surgery.graph)),
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_runs_no_more_python_than_was_committed(name: str) -> None:
    budget = json.loads(BUDGET.read_text())[name]
    found = stages(name)
    for stage, calls in found.items():
        assert calls <= ROOM * budget[stage], (
            f"{name}: {stage} takes {calls} calls, {budget[stage]} were committed"
        )
        assert calls >= 0.5 * budget[stage], (
            f"{name}: {stage} takes {calls} calls: commit that, not {budget[stage]}"
        )


if __name__ == "__main__":
    BUDGET.write_text(json.dumps({name: stages(name) for name in MODELS}, indent=1) + "\n")
    print(BUDGET.read_text())
