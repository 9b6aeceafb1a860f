"""Whether a model's code asks if it is in training mode: without that, no run in training mode is recorded."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.capture.paths.training_reads import TrainingReads

X = torch.randn(2, 3, 8, 8)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention = (
            nn.Conv2d(3, 8, 3),
            nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        return self.attention(x, x, x)[0]


class Asks(nn.Module):
    def __init__(self, asks: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.net, self.other, self.asks = plain(), nn.Conv2d(3, 4, 5), asks

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x) if self.asks(self) else self.net(x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 if self.training else super().forward(x)


class OwnFlag(nn.Module):
    training = False

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("make", [plain, Attends, lambda: Asks(lambda module: False)])
def test_code_that_does_not_ask(make: Callable[[], nn.Module]) -> None:
    surgery = surgeon.inspect(make(), X)
    assert not surgery.graph.by_mode and len(surgery.runs) == 1


def drop_path(module: nn.Module) -> bool:
    return bool(getattr(module, "training"))  # noqa: B009  # as code that takes the name from elsewhere


@pytest.mark.parametrize(
    "asks", [lambda module: module.training, lambda module: module.net[0].training, drop_path]
)
def test_code_that_asks(asks: Callable[[nn.Module], bool]) -> None:
    surgery = surgeon.inspect(Asks(asks).eval(), X)
    assert surgery.graph.by_mode and len(surgery.runs) == 2


@pytest.mark.parametrize("part", [OwnNorm(4), OwnFlag(), torch.jit.script(nn.ReLU())])
def test_classes_that_may_ask(part: nn.Module) -> None:
    assert TrainingReads([part]).any or surgeon.inspect(nn.Sequential(plain(), part).eval(), X).graph.by_mode


def test_hooks_ask_as_well() -> None:
    model = plain()
    model[0].register_forward_hook(lambda module, args, out: out * 2 if module.training else out)
    assert surgeon.inspect(model.eval(), X).graph.by_mode


def test_changing_the_mode_counts() -> None:
    class Freezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Tensor:
            self.net.eval()
            return self.net(x)

    assert surgeon.inspect(Freezes(), X).graph.by_mode


def test_the_flag_is_as_before() -> None:
    model, other = plain(), plain().train()
    with TrainingReads(model.modules()) as reads:
        assert not reads.any
        seen = []
        thread = threading.Thread(target=lambda: seen.append(other.eval().training))
        thread.start()
        thread.join()
        assert seen == [False] and not reads.any
        model.train()
        assert reads.any and model.training and model.__dict__["training"] is True
    assert "training" not in vars(nn.Module)
    assert model.training and not other.training


class DropPath(nn.Module):
    """Stochastic depth as libraries write it; `does` is what it does with a sample that stays."""

    def __init__(self, does: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return self.does(x, x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.8).div_(0.8))


class Path(nn.Module):
    def __init__(self, does: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.path, self.end = plain(), DropPath(does), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return self.end(y + self.path(y))


def test_stochastic_depth_needs_no_run_in_training_mode() -> None:
    model = Path(lambda x, r: x * r)
    before = torch.get_rng_state()
    surgery = surgeon.inspect(model, X)
    assert not surgery.graph.by_mode and len(surgery.runs) == 1 and model.path.training
    assert torch.equal(before, torch.get_rng_state())
    small = surgeon.shrink(model, 0.5, example_inputs=X).train()
    assert small(X).shape == (2, 4, 4, 4) and small.net[0].out_channels == 4


@pytest.mark.parametrize(
    "does",
    [
        lambda x, r: (x * r).flip(1),
        lambda x, r: x * r + 1,
        lambda x, r: x * r * torch.rand(x.shape[1])[:, None, None],
        lambda x, r: x.flip(1) if r[0] > 2 else x * r,  # seldom
        lambda x, r: x.flip(1) if random.random() > 2 else x * r,
        lambda x, r: x.flip(0) * r,
        lambda x, r: (x * r).to(torch.float64),
    ],
)
def test_what_does_more_than_to_scale_samples_is_recorded(does: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert surgeon.inspect(Path(does).eval(), X).graph.by_mode
