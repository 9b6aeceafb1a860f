"""compact folds only what is the same number for every input, size and call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A convolution of which three filters are zero, something in between, a linear layer."""

    def __init__(self, between: Forward, kernel: int = 1, after: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)
        self.after = after if after is not None else nn.Conv2d(8, 8, kernel, padding=kernel // 2)
        self.extra = nn.Parameter(torch.randn(8))
        self.register_buffer("held", torch.zeros(1))
        self.between = between
        self.deep = nn.Parameter(torch.randn(8, 1, 3, 3))
        with torch.no_grad():
            self.first.weight[:3] = 0
            self.first.bias[:3] = 1  # type: ignore[index]  # it has one
            self.deep[:3] = torch.tensor([[0.0, 0, 0], [0, -1, 0], [0, 0, -1]])
            self.deep[0, 0, 0, 0] = 1.5  # above zero, but for the places that see no padding

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, x))  # type: ignore[no-any-return]  # torch's


def _loop(self: Any, x: Tensor) -> Tensor:
    y = self.first(x).flatten(2)
    total = 0 * y[:, :, 0]
    for place in range(y.shape[2]):
        total = total + y[:, :, place]
    return total


def _padded(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    return F.max_pool2d(F.pad(y, (0, -y.shape[3] % 4, 0, -y.shape[2] % 4)), 4).mean((2, 3))


def _item(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.first(x).mean((2, 3)) + self.extra * float(x.abs().mean()))


def _counter(self: Any, x: Tensor) -> Tensor:
    self.held += 1
    return self.first(x).mean((2, 3)) * self.held


def _memory(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.first(x).mean((2, 3)) + self.held)
    self.held.copy_(y.mean().detach())
    return y


SIZES: dict[str, Forward] = {
    "summed over places": lambda self, x: self.first(x).sum((2, 3)),
    "summed over the batch": lambda self, x: self.first(x).mean((2, 3)).sum(0, keepdim=True),
    "a norm over places": lambda self, x: self.first(x).norm(dim=(2, 3)),
    "times a size": lambda self, x: self.first(x).mean((2, 3)) * x.shape[-1],
    "summed by einsum": lambda self, x: torch.einsum("bchw->bc", self.first(x)),
    "a softmax over places": lambda self, x: self.first(x).flatten(2).softmax(2).amax(2),
    "added in a loop": _loop,
    "padded to a multiple": _padded,
    "a padded convolution of one place": lambda self, x: self.after(
        self.first(x).mean((2, 3), keepdim=True)
    ).mean((2, 3)),
}


def _beside_padding(self: Any, x: Tensor) -> Tensor:
    """On maps of an even size, windows of stride 2 meet the padding at two of the four sides."""
    y = F.conv2d(F.relu(self.first(x)), self.deep, stride=2, padding=1, groups=8)
    return F.relu(y).mean((2, 3))


SIZES["beside padding on some sides"] = _beside_padding
CALLS: dict[str, Forward] = {
    "a number that was read": _item,
    "a counter": _counter,
    "a memory": _memory,
}


@pytest.mark.parametrize("name", [*SIZES, *CALLS])
def test_constants_that_are_no_constants(name: str) -> None:
    kernel = 3 if "padded convolution" in name else 1
    model = Net((SIZES | CALLS)[name], kernel).eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    small = surgeon.compact(model, x).model
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    for shape in ((2, 3, 8, 8), (3, 3, 8, 8), (2, 3, 12, 12), (2, 3, 9, 10)):
        y = 10 * torch.randn(shape)
        with torch.no_grad():
            want, got = model(y), small(y)
        assert torch.allclose(want, got, rtol=1e-4, atol=1e-5 * float(want.abs().max())), shape


FIXED: dict[str, Forward] = {
    "a mean": lambda self, x: F.gelu(self.first(x)).mean((2, 3)),
    "a maximum": lambda self, x: self.first(x).amax((2, 3)),
    "a pool": lambda self, x: F.max_pool2d(self.first(x), 2).mean((2, 3)),
    "a parameter": lambda self, x: self.first(x).mean((2, 3)) * self.extra,
    "a comparison": lambda self, x: torch.where(self.first(x) > 0, self.first(x), 0.1 * self.first(x)).mean(
        (2, 3)
    ),
}


@pytest.mark.parametrize("name", list(FIXED))
def test_constants_are_folded(name: str) -> None:
    model = Net(FIXED[name]).eval()
    found = surgeon.compact(model, torch.randn(2, 3, 8, 8))
    assert found.removed == {"first.weight[0]": (3, 8)} and [fold.tensor for fold in found.folded] == [
        "last.bias"
    ]
    y = torch.randn(3, 3, 11, 12)
    with torch.no_grad():
        assert torch.allclose(model(y), found.model(y), atol=1e-5)


def test_a_number_of_channels_in_the_code() -> None:
    model = Net(lambda self, x: (y := F.relu(self.first(x)).mean((2, 3))) / y.shape[1]).eval()
    found = surgeon.compact(model, torch.randn(2, 3, 8, 8))
    assert not found.removed and "changes other numbers" in found.kept[0].why


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.draw = nn.Linear(4, 8), nn.Linear(8, 3), draw
        self.extra = nn.Parameter(torch.rand(8) + 0.5)
        with torch.no_grad():
            self.first.weight[:3] = self.first.bias[:3] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.extra * self.draw())  # type: ignore[no-any-return]  # torch's


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randint(1, 9, (1,)),
        lambda: torch.rand(1),
        lambda: torch.poisson(torch.full((1,), 4.0)),
        lambda: torch.empty(1).log_normal_(),
        lambda: torch.randperm(7)[:1],
    ],
)
def test_draws_are_no_constants(draw: Callable[[], Tensor]) -> None:
    found = surgeon.compact(Draws(draw).eval(), torch.randn(2, 4))
    assert not found.removed and not found.folded


class Moved(nn.Module):
    """Entries change their places by an index that is data."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.move = move
        with torch.no_grad():
            self.first.weight[:3] = self.first.bias[:3] = 0
            self.second.bias.fill_(-30)  # alive for large inputs alone

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.move(self.first(x)))))  # type: ignore[no-any-return]  # torch's


TURNED = torch.tensor([3, 4, 5, 6, 7, 0, 1, 2])


@pytest.mark.parametrize(
    "move",
    [
        lambda h: torch.zeros_like(h).index_add(1, TURNED, h),
        lambda h: torch.zeros_like(h).scatter(1, TURNED.expand(h.shape), h),
        lambda h: torch.zeros_like(h).index_copy(1, TURNED, h),
        lambda h: torch.fft.rfft(h, dim=1).imag.repeat(1, 2)[:, :8],
        lambda h: F.glu(torch.cat([h, h.flip(1)], 1), 1),
    ],
)
def test_entries_that_change_places(move: Callable[[Tensor], Tensor]) -> None:
    model = Moved(move).eval()
    try:
        small = surgeon.compact(model, torch.randn(4, 3)).model
    except surgeon.errors.InputError:
        return
    y = 300 * torch.randn(64, 3)
    with torch.no_grad():
        want = model(y)
        assert torch.allclose(want, small(y), rtol=1e-4, atol=1e-5 * float(want.abs().max()))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.deep, self.down = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 4, 1),
        )
        with torch.no_grad():
            self.deep.weight[:2] = self.deep.bias[:2] = 0  # type: ignore[index]  # it has one
            self.up.weight[5] = self.up.bias[5] = self.deep.bias[5] = 0  # type: ignore[index]  # it has one

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.deep(F.relu(self.up(x)))))  # type: ignore[no-any-return]  # torch's


def test_depthwise_filters() -> None:
    model, x = Depthwise().eval(), torch.randn(2, 3, 8, 8)
    found = surgeon.compact(model, x)
    assert found.removed == {"up.weight[0]": (3, 8)}
    with torch.no_grad():
        assert torch.allclose(model(x), found.model(x), atol=1e-6)


def test_models_that_make_float32_themselves() -> None:
    """They do not run in float64, and are compared as they are."""

    def cast(self: Any, x: Tensor) -> Tensor:
        return self.first(x).float().mean((2, 3)) * x.shape[-1]

    model = Net(cast).eval()
    small = surgeon.compact(model, torch.randn(2, 3, 8, 8)).model
    y = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(model(y), small(y), rtol=1e-4, atol=1e-4)
