"""What leaves is what was asked for: shares of every group, said where they differ, and requests that remove nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import BudgetError, NothingRemovedWarning


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 11 * 11, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    ).eval()  # fmt: skip


class Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.b, self.nb = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(into, out, 1, stride) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.nb(self.b(self.na(self.a(x)).relu()))
        return (y + self.short(x)).relu()


def resnet20() -> nn.Module:
    widths = [(16, 16, 1)] * 3 + [
        (16, 32, 2),
        (32, 32, 1),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
    ]
    blocks = [Block(*width) for width in widths]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    ).eval()


MODELS = {"lenet": (lenet, (1, 1, 28, 28)), "resnet20": (resnet20, (1, 3, 32, 32))}


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_every_group_loses_the_share_or_is_named(
    name: str, ratio: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.selection.request.Request.block", lambda self, device: block)
    make, shape = MODELS[name]
    surgery = surgeon.inspect(make(), torch.randn(shape))
    plan = surgery.plan(ratio)
    assert "missed" not in plan.request
    for group in surgery.groups:
        tensor, dim = group.slots[0]
        left = len(plan.kept[tensor][dim]) / surgery.graph.tensors[tensor].shape[dim]
        assert abs(left - (1 - ratio)) <= 0.1, group.name


def test_what_cannot_be_met_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    plan = surgeon.inspect(model, torch.randn(2, 5)).plan(0.5, round_to=1)
    (one,) = plan.request["missed"]
    assert (one["group"], one["width"], one["asked"]) == ("0.weight[0]", 3, 0.5)
    assert one["reached"] == pytest.approx(2 / 3)
    assert "0.weight[0]: asked 50%, reached 67% (1 of 3 channels stay)" in str(plan)
    again = surgeon.Plan.from_json(plan.to_json())
    assert again.request["missed"] == [one]


def test_a_block_that_the_user_names_is_kept() -> None:
    surgery = surgeon.inspect(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2)), torch.randn(2, 5))
    assert len(surgery.plan(0.5, round_to=8).kept["0.weight"][0]) == 8
    assert surgery.plan(0.5, round_to=8).request["missed"][0]["reached"] == pytest.approx(1 / 3)
    assert len(surgery.plan(0.5).kept["0.weight"][0]) == 6


def test_a_cap_is_part_of_what_is_asked() -> None:
    surgery = surgeon.inspect(lenet(), torch.randn(1, 1, 28, 28))
    plan = surgery.plan(0.5, max_ratio=0.2, round_to=1)
    assert "missed" not in plan.request
    assert len(plan.kept["6.weight"][0]) == 96


@pytest.mark.parametrize("asked", [{"macs": "150%"}, {"params": 1.0}, {"ratio": 0.001}, {"ratio": 0.0}])
def test_a_request_that_removes_nothing_warns(asked: dict[str, float]) -> None:
    surgery = surgeon.inspect(lenet(), torch.randn(1, 1, 28, 28))
    with pytest.warns(NothingRemovedWarning, match="nothing leaves") as caught:
        plan = surgery.plan(**asked)
    assert not plan.kept and "nothing leaves" in str(plan)
    assert caught[0].filename == __file__


def test_what_removes_something_does_not_warn() -> None:
    surgery = surgeon.inspect(lenet(), torch.randn(1, 1, 28, 28))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingRemovedWarning)
        surgery.plan(0.5)
        surgery.sensitivity(ratios=(0.01,))


def test_no_macs_are_said() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(10, 16), nn.Parameter(torch.ones(16))

        def forward(self, ids: Tensor) -> Tensor:
            return (self.table(ids) * self.scale).mean(-1)

    surgery = surgeon.inspect(Scaled(), torch.tensor([[1, 2]]))
    plan = surgery.plan(0.5, round_to=1)
    assert "MACs say nothing" in str(plan) and "0 MACs" in repr(plan)
    with pytest.raises(BudgetError, match="0 MACs"):
        surgery.plan(macs=0.5)
