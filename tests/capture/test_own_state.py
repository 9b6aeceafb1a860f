"""What modules hold that forward changes and decides by: the next call may take another path, and that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import PathWarning

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Keeping(nn.Module):
    """Two convolutions; between them the code does something with what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = nn.Linear(16, 5)
        self.count, self.first, self.seen = 0, True, list[int]()
        self.kept: Any = None
        self.height = 0
        self.register_buffer("state", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.step(self.a(x).relu())).mean((2, 3)))
        return out

    def step(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Counted(Keeping):
    def step(self, y: Tensor) -> Tensor:
        self.count += 1
        return y.flip(1) if self.count > 100 else y


class ByName(Counted):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(getattr(self, "step")(self.a(x))).mean((2, 3)))  # noqa: B009  a name that is made when it runs
        return out


class AtFirst(Keeping):
    def step(self, y: Tensor) -> Tensor:
        if self.first:
            self.first = False
            return y
        return y.flip(1)


class Smoothed(Keeping):
    def step(self, y: Tensor) -> Tensor:
        self.kept = y if self.kept is None else self.kept + y
        return self.kept


class InABuffer(Keeping):
    def step(self, y: Tensor) -> Tensor:
        if self.state is None:
            self.state = y.mean((0, 2, 3), keepdim=True)
        return y - self.state


class WithPast(Keeping):
    def step(self, y: Tensor) -> Tensor:
        past = self.kept
        self.kept = (y, y.abs())
        return y if self.kept is not None and past is None else y + past[0]


class Marked(Keeping):
    def step(self, y: Tensor) -> Tensor:
        if hasattr(self, "mark"):
            return y.flip(1)
        self.mark = 1
        return y


class InTurns(Keeping):
    def step(self, y: Tensor) -> Tensor:
        self.count += 1
        return (y, y.flip(1))[(self.count - 1) % 2]


class History(Keeping):
    def step(self, y: Tensor) -> Tensor:
        self.seen.append(1)
        return y.flip(1) if len(self.seen) > 2 else y


class Matched(Keeping):
    def step(self, y: Tensor) -> Tensor:
        match self.count:
            case 3:
                return y.flip(1)
        self.count += 1
        return y


KINDS = {
    Counted: "count",
    ByName: "count",
    AtFirst: "first",
    Smoothed: "kept",
    InABuffer: "state",
    WithPast: "kept",
    Marked: "mark",
    InTurns: "count",
    History: "seen",
    Matched: "count",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_forward_changes_and_tests_is_said(kind: type[Keeping]) -> None:
    model = kind().eval()
    held = dict(vars(model))
    surgery = surgeon.inspect(model, X)
    assert any(f"`{KINDS[kind]}`, which forward changes" in path for path in surgery.unseen), surgery.unseen
    assert all("test_own_state.py:" in path for path in surgery.unseen)
    assert all(held[name] is value for name, value in vars(model).items()) and not model.seen
    with pytest.warns(PathWarning, match="which forward changes"):
        small = surgeon.shrink(model, 0.5, example_inputs=X)
    assert small(X).shape == (2, 5) and small.a.out_channels == 8


class Table(Keeping):
    """What it keeps is the same at each call."""

    def step(self, y: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(6.0)
        return y + self.kept


class Sizes(Keeping):
    """A size that is noted on the way, for other methods."""

    def step(self, y: Tensor) -> Tensor:
        self.height, self.width = y.shape[2], y.shape[3]
        return y.flatten(2).view(*y.shape[:2], self.height, self.width)


class Checked(Keeping):
    def step(self, y: Tensor) -> Tensor:
        self.count += 1
        if self.count > 10:
            raise RuntimeError("this model may be called ten times")
        return y


@pytest.mark.parametrize("kind", [Table, Sizes, Checked])
def test_what_changes_no_path_is_not_said(kind: type[Keeping]) -> None:
    assert surgeon.inspect(kind().eval(), X).unseen == ()


def test_state_of_an_earlier_call_stays_whole_and_the_reason_says_what_to_do() -> None:
    torch.manual_seed(0)
    model = InABuffer().eval()
    with torch.no_grad():
        model(X)
    surgery = surgeon.inspect(model, X)
    assert "if an earlier call left it there, put back what was there at first" in str(surgery.explain("a"))
    model.state = None
    small = surgeon.shrink(model, 0.5, example_inputs=X)
    assert small.a.out_channels == 8
