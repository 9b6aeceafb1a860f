"""Numbers that say a width and that no forward reads follow the widths, so that other methods work after a cut."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import WidthWarning

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module, ratio: float = 0.5) -> nn.Module:
    model.eval()
    surgery = surgeon.inspect(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = surgery.plan(ratio, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    again = surgeon.Plan.from_json(plan.to_json()).apply(model)
    for (_, a), (_, b) in zip(small.named_modules(), again.named_modules(), strict=True):
        assert numbers(a) == numbers(b)
    return small


def numbers(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | list | dict) and name[0] != "_"
    }


class Reparametrised(nn.Module):
    """Two branches that `deploy` makes one layer of, by the widths that it keeps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_channels = self.out_channels = width
        self.depth = 16  # no width, though it is the same number as one elsewhere
        self.conv, self.norm, self.short = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.BatchNorm2d(width),
        )
        self.one: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.short(x) if self.one is None else self.one(x)

    @torch.no_grad()
    def deploy(self) -> None:
        eye = torch.zeros(self.in_channels, self.in_channels, 3, 3)
        for channel in range(self.in_channels):
            eye[channel, channel, 1, 1] = 1
        one = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1)
        one.bias.zero_()  # type: ignore[union-attr]
        one.weight.zero_()
        for weight, norm in ((self.conv.weight, self.norm), (eye, self.short)):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
            one.weight.add_(weight * scale.view(-1, 1, 1, 1))
            one.bias.add_(norm.bias - norm.running_mean * scale)  # type: ignore[union-attr,operator]
        self.one = one


def test_a_block_can_be_deployed_after_a_cut() -> None:
    small = cut(nn.Sequential(nn.Conv2d(3, 8, 3), Reparametrised(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    block = small[1]  # type: ignore[index]
    assert (block.in_channels, block.out_channels, block.depth) == (4, 4, 16)
    before = small(X)
    block.deploy()
    torch.testing.assert_close(small(X), before)


class Split(nn.Module):
    """Another forward of the same, by a number where forward asks the tensor; its layers are two levels below."""

    def __init__(self) -> None:
        super().__init__()
        self.half = 6
        self.first = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU())
        self.inner = nn.ModuleList([nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())])
        self.last = nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(list(self.first(x).chunk(2, 1)))

    def joined(self, parts: list[Tensor]) -> Tensor:
        parts.extend(layer(parts[-1]) for layer in self.inner)
        return self.last(torch.cat(parts, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        return self.joined(list(self.first(x).split((self.half, self.half), 1)))


def test_another_forward_works_after_a_cut() -> None:
    small = cut(Split())
    assert small.half == 3
    torch.testing.assert_close(small.forward_split(X), small(X))


class Backbone(nn.Module):
    """Says its widths to others, and makes a new head by one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.patch_size = 5
        self.feature_info = [
            {"module": "stem", "num_chs": 8, "reduction": 4},
            {"module": "body", "num_chs": 16, "reduction": 8},
        ]
        self.rank = {"default": 8}
        self.stem, self.body = nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))

    def reset(self, classes: int) -> None:
        self.head = nn.Linear(self.num_features, classes)


def test_a_new_head_fits_and_what_is_no_width_stays() -> None:
    small = cut(Backbone())
    small.reset(7)
    small.train()(X).sum().backward()
    assert small(X).shape == (2, 7)
    assert (small.num_features, small.patch_size, small.rank) == (8, 5, {"default": 4})
    assert [(d["num_chs"], d["reduction"]) for d in small.feature_info] == [(4, 4), (8, 8)]


class Unclear(nn.Module):
    """Two layers of one width, of which one may lose channels: nothing says which the number means."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))

    def made(self) -> nn.Conv2d:
        return nn.Conv2d(3, self.width, 1)


def test_what_cannot_be_decided_is_said_once() -> None:
    model = Unclear().eval()
    surgery = surgeon.inspect(model, X)
    with pytest.warns(WidthWarning, match="width = 8") as caught:
        plan = surgery.plan(0.5, round_to=1, ignore=[model.second])
    assert len(caught) == 1
    assert plan.apply(model).width == 8
