"""Constants of the code among channels: padding, states of zeros, empty writes. They go with what they lie beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import BudgetError


def cut(model: nn.Module, x: Tensor) -> nn.Module:
    return surgeon.shrink(model.eval(), 0.5, example_inputs=x, round_to=1)


BESIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda y: torch.cat([torch.zeros(y.shape[0], y.shape[1], 2), y], -1),
    "both sides": lambda y: torch.cat(
        [y.new_zeros(y.shape[0], 16, 1), y, torch.full((y.shape[0], 16, 1), 2.0)], -1
    ),
    "pooled": lambda y: F.avg_pool1d(torch.cat([torch.ones(y.shape[0], 16, 2), y], -1), 2, 1),
    "summed up": lambda y: torch.cat([torch.ones(y.shape[0], 16, 2), y], -1).cumsum(-1),
    "stacked": lambda y: torch.stack([torch.ones(y.shape[0], 16, 9), y], -1).flatten(2),
    "written over": lambda y: torch.slice_scatter(y.new_ones(y.shape[0], 16, 11), y, 2, 2),
    "one by one": lambda y: _filled(y),
}


def _filled(y: Tensor) -> Tensor:
    out = torch.zeros(y.shape[0], y.shape[1], 12)
    for place in range(0, 9, 2):
        out[:, :, place + 1] = y[:, :, place].sin()
    return out


class Beside(nn.Module):
    """A convolution over channels beside which the code puts constants."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(BESIDE[self.how](self.first(x)))


@pytest.mark.parametrize("how", BESIDE)
def test_constants_beside_channels_leave_with_them(how: str) -> None:
    assert cut(Beside(how), torch.randn(2, 3, 9)).first.out_channels == 8


class Mixed(nn.Module):
    """Padding of channels that a layer over places reads, and products with a matrix of ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.over = how, nn.Linear(6, 16), nn.Linear(5, 7)
        self.last = nn.Linear(20 if how == "padding" else 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = F.pad(y, (0, 4), value=1.0) if self.how == "padding" else y @ torch.ones(16, 16)
        return self.last(self.over(y.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("how", ["padding", "ones"])
def test_what_a_product_makes_of_constants_stays(how: str) -> None:
    small = cut(Mixed(how), torch.randn(2, 5, 6))
    assert small.first.out_features == 8
    assert small.last.in_features == {"padding": 12, "ones": 16}[how]


class Written(nn.Module):
    """Rows of 4 heads of 6 channels written by index into zeros; a product follows, by heads or over all channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "flat":
            state = y.new_zeros(2, 5, 24)
        else:
            y, state = y.view(2, 5, 4, 6), y.new_zeros(2, 5, 4, 6)
        rows = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])
        state[rows] = y[rows]
        if self.how == "flat":
            state = state.view(2, 5, 4, 6)
        if self.how == "merged":
            state = (y.flatten(2).sin() @ state.flatten(2).transpose(1, 2)) @ state.flatten(2)
        else:
            heads = y.view(2, 5, 4, 6).transpose(1, 2)
            states = state.transpose(1, 2)
            state = ((heads.sin() @ states.transpose(2, 3)) @ states).transpose(1, 2).flatten(2)
        return self.last(state)


@pytest.mark.parametrize("how", ["heads", "merged", "flat"])
def test_zeros_written_by_index_leave_with_what_was_written(how: str) -> None:
    model = Written(how).eval()
    x = torch.randn(2, 5, 8)
    assert surgeon.inspect(model, example_inputs=x).frozen_share.frozen == {}
    assert cut(model, x).first.out_features == 12


class State(nn.Module):
    """A gated state that starts with zeros, as many as `size` says; it is an output as well."""

    def __init__(self, size: str, returned: bool) -> None:
        super().__init__()
        self.size, self.returned = size, returned
        self.first, self.gate, self.new = nn.Linear(3, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.first(x).chunk(2, -1)
        state = torch.zeros(*b.shape) if self.size == "of another" else torch.zeros(b.shape[0], 8)
        gate = self.gate(torch.cat([b, state], -1)).sigmoid()
        state = gate * state + (1 - gate) * self.new(torch.cat([b, gate * state], -1)).tanh()
        out = self.last(torch.cat([a, state], -1))
        return (out, state) if self.returned else (out,)


def test_a_state_of_a_size_of_its_own() -> None:
    small = cut(State("its own", True), torch.randn(2, 3))
    assert small.first.out_features == 8 and small.gate.out_features == 8


def test_a_state_keeps_the_share_of_the_width_that_gave_its_size() -> None:
    surgery = surgeon.inspect(State("of another", False).eval(), torch.randn(2, 3))
    plan = surgery.plan(0.5, round_to=1, scope="global")
    small = plan.apply(surgery.model)
    assert small.gate.out_features == small.first.out_features // 2 < 8
    assert surgeon.verify(surgery.model, small, plan, torch.randn(2, 3)).error < 1e-12


def test_a_state_that_is_an_output_keeps_that_width_and_the_error_says_where() -> None:
    with pytest.raises(BudgetError, match=r"is the model's output '1' \(aten.add.*test_unowned_entries.py"):
        cut(State("of another", True), torch.randn(2, 3))


class Sampled(nn.Module):
    """Places drawn at random, as many as a number says, out of as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[:, torch.randint(0, x.shape[1], (3,))].relu())


def test_whole_numbers_that_are_drawn_have_no_width() -> None:
    assert cut(Sampled(), torch.randn(2, 10, 8)).first.out_features == 8


class Windows(nn.Module):
    """A mask of windows of which some are empty (`-0` is 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(12, 36), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        places = torch.zeros(n)
        for number, part in enumerate((slice(0, -2), slice(-2, -0), slice(-0, None))):
            places[part] = number
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        away = places[:, None] - places
        return self.last(((q @ k.mT + away).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def test_empty_parts_have_no_size_to_mend() -> None:
    assert cut(Windows(), torch.randn(2, 8, 12)).qkv.out_features < 36


class Identity(nn.Module):
    """A residual path written as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) @ (self.mix + torch.eye(8))).relu())


def test_an_identity_shrinks_with_what_it_meets() -> None:
    small = cut(Identity(), torch.randn(2, 6))
    assert small.mix.shape == (4, 4)


class Queries(nn.Module):
    """Learned queries, repeated for a batch whose length is no size that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 16))
        self.attend = nn.MultiheadAttention(16, 4, kdim=5, vdim=5, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return self.last((queries + self.attend(queries, x, x)[0]).mean(1))


def test_a_batch_of_repeated_queries_holds_no_heads() -> None:
    small = cut(Queries(), torch.randn(2, 6, 5))
    assert small.last.in_features == 8 and small.attend.q_proj_weight.shape == (8, 8)


class Hidden(nn.Module):
    """Uses tensors that it does not register: in a module in a list, or in a function's closure."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden = [apply]
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.d(self.hidden[0](y) + self.c(self.b(y).relu()))


def _zeros() -> nn.Module:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _scaled_by(numbers: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: y * numbers


@pytest.mark.parametrize(
    "apply",
    [nn.Linear(8, 8), nn.LayerNorm(8), _zeros(), _scaled_by(torch.ones(8)), _scaled_by(torch.rand(8))],
    ids=["weights", "ones", "zeros", "ones in a closure", "numbers in a closure"],
)
def test_tensors_that_were_there_before_stay_whatever_their_numbers(
    apply: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    small = surgeon.shrink(Hidden(apply).eval(), 0.5, example_inputs=torch.randn(2, 5), round_to=1)
    assert (small.a.out_features, small.b.out_features) == (8, 6)
