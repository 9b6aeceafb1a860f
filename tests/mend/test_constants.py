"""Numbers that are a width at one place and something else at another: the other stays what it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from masked import zeroed
from torch import Tensor, nn

import surgeon
from surgeon.errors import MendError, ProofError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Three layers and a view that wants the width of the second; `extra` does something with that number."""

    def __init__(self, extra: Callable[[Two, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.width, self.extra = 8, extra

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).view(-1, self.width)).relu()
        return self.extra(self, self.c(x))


def _loop(m: Two, y: Tensor) -> Tensor:
    for _ in range(m.width // 4):
        y = y * 0.5
    return y


EXTRAS: dict[str, Callable[[Two, Tensor], Tensor]] = {
    "scale": lambda m, y: y * (1.0 / m.width),
    "division": lambda m, y: y / m.width,
    "root": lambda m, y: y * m.width**-0.5,
    "logarithm": lambda m, y: y * math.log(m.width),
    "tensor": lambda m, y: y * torch.tensor([1.0, 1 / m.width, 2.0]),
    "tensor without dims": lambda m, y: y * torch.tensor(float(m.width)).sqrt(),
    "epsilon": lambda m, y: y / (y.norm(dim=1, keepdim=True) + 1 / m.width),
    "power": lambda m, y: (y.abs() + 1) ** (m.width / 4),
    "temperature": lambda m, y: (y / m.width).softmax(-1),
    "clamp": lambda m, y: y.clamp(max=m.width / 80),
    "shift": lambda m, y: y + m.width,
    "positions": lambda m, y: y + torch.arange(3.0) / m.width,
    "table of whole numbers": lambda m, y: y + torch.sin(torch.arange(3) / m.width),
    "tensor of one number": lambda m, y: y + torch.full((3,), float(m.width)),
    "roll": lambda m, y: y.roll(m.width // 4, 1),
    "loop": _loop,
    "decision": lambda m, y: y if m.width > 6 else y * 2,
    "decision on equality": lambda m, y: y * (1.0 if m.width == 8 else 2.0),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_width_that_is_a_number_elsewhere_is_changed_where_it_is_a_width(extra: str) -> None:
    torch.manual_seed(0)
    model = Two(EXTRAS[extra]).eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, X)
    assert not proof.rescaled and small.a.out_features == 4
    torch.testing.assert_close(small(X), zeroed(model, plan)(X))
    assert small.width == 8, "it is still read where it is no width"
    again = surgeon.Plan.from_json(plan.to_json()).apply(model)
    assert torch.equal(again(X), small(X))


def test_a_rate_of_dropout_stays() -> None:
    class Dropped(Two):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 1 / self.width, self.training)

    model = Dropped(lambda m, y: y)
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    assert small.width == 8 and small.a.out_features == 4


def test_of_two_uses_in_one_line_the_width_is_changed() -> None:
    class Lines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(6, 8), nn.Linear(8, 3), 8

        def forward(self, x: Tensor) -> Tensor:
            return (1 / self.width) * self.b(self.a(x).view(-1, self.width) / self.width + 1 / self.width)

    model = Lines().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert not surgeon.verify(model, small, plan, X).rescaled
    assert [(e.kind, e.name, e.new) for e in plan.edits or ()] == [("use", "forward:2:self.width", 4)]
    torch.testing.assert_close(small(X), zeroed(model, plan)(X))


def test_a_literal_that_stands_twice_in_a_line() -> None:
    class Literals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((1 / 8) * self.a(x).view(-1, 8) / 8)

    model = Literals().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert [(e.kind, e.name) for e in plan.edits or ()] == [("source", "forward:3")]
    torch.testing.assert_close(small(X), zeroed(model, plan)(X))


def test_a_local_name_of_a_width() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(6, 8), nn.Linear(8, 3), 8

        def forward(self, x: Tensor) -> Tensor:
            n = self.width
            x = self.a(x).view(-1, n)
            return self.b(x) / n

    model = Local().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    assert [(e.kind, e.name) for e in plan.edits or ()] == [("use", "forward:2:n")]
    torch.testing.assert_close(small(X), zeroed(model, plan)(X))


class Attention(nn.Module):
    """Heads of 8; code that needs their number only where they are put together again."""

    def __init__(self, scale: Callable[[Attention], float], width: int = 32) -> None:
        super().__init__()
        self.heads, self.size, self.scale = 4, 8, scale
        self.q, self.k, self.v = (nn.Linear(6, width) for _ in range(3))
        self.out = nn.Linear(width, 5)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.size).transpose(-3, -2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = (q @ k.transpose(-1, -2) * self.scale(self)).softmax(-1)
        y = (weights @ v).transpose(-3, -2)
        return self.out(y.reshape(*y.shape[:-2], self.heads * self.size))


TOKENS = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scale", [lambda m: m.size**-0.5, lambda m: m.heads**-0.5, lambda m: 1 / m.heads])
def test_whole_heads_leave_the_scale_as_it_is(scale: Callable[[Attention], float]) -> None:
    torch.manual_seed(0)
    model = Attention(scale).eval()
    plan = surgeon.inspect(model, TOKENS).plan(0.5, round_to=1, heads="whole")
    small = plan.apply(model)
    assert not surgeon.verify(model, small, plan, TOKENS).rescaled
    assert small.q.out_features == 16 and small.size == 8
    torch.testing.assert_close(small(TOKENS), zeroed(model, plan)(TOKENS))


@pytest.mark.parametrize(
    "scale",
    [
        lambda m: m.size**-0.5,
        lambda m: 1 / math.sqrt(m.size),
        lambda m: 1 / m.size,
        lambda m: (2 * m.size) ** -0.5,
    ],
)
def test_the_scale_of_attention_follows_the_size_of_heads(scale: Callable[[Attention], float]) -> None:
    torch.manual_seed(0)
    model = Attention(scale).eval()
    plan = surgeon.inspect(model, TOKENS).plan(0.5, round_to=1, heads="dims")
    small = plan.apply(model)
    assert (small.heads, small.size) == (4, 4)
    proof = surgeon.verify(model, small, plan, TOKENS)
    assert [(before, after) for _, before, after in proof.rescaled] == [(scale(model), scale(small))]


@pytest.mark.parametrize(
    "mean", [lambda d, n: d**2 / n, lambda d, n: d / math.sqrt(n), lambda d, n: d.square().mul(1 / n)]
)
def test_a_mean_of_differences_follows_the_width(mean: Callable[[Tensor, int], Tensor]) -> None:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.points = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return mean(torch.cdist(x, self.points), x.shape[-1])

    torch.manual_seed(0)
    model = Prototypes().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert len(surgeon.verify(model, small, plan, X).rescaled) == 1
    kept = list(plan.kept["a.weight"][0])
    torch.testing.assert_close(small(X), mean(torch.cdist(model.a(X)[:, kept], model.points[:, kept]), 4))


def test_a_mean_by_hand_follows_the_width() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.width = nn.Linear(6, 8), 8

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).view(-1, self.width).tanh()
            return x.sum(1) / self.width + (x * x).sum(1).sqrt() / math.sqrt(self.width)

    model = Mean().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert small.width == 4
    rescaled = surgeon.verify(model, small, plan, X).rescaled
    assert [(before, after) for _, before, after in rescaled] == [(8, 4), (math.sqrt(8), 2)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda m, y: y + 1 / m.b.out_features, "changes with a width that leaves"),
        (lambda m, y: y * math.log(m.b.out_features), "changes with a width that leaves"),
    ],
)
def test_a_number_that_follows_a_layer_by_itself_is_refused(
    changed: Callable[[Two, Tensor], Tensor], message: str
) -> None:
    model = Two(changed).eval()
    surgery = surgeon.inspect(model, X)
    with pytest.raises(MendError, match=message) as error:
        surgery.plan(0.5, round_to=1)
    assert "test_constants.py" in error.value.where


def test_the_proof_refuses_a_number_that_scales_another_sum() -> None:
    """A share that the plan keeps somewhere is no reason: the sum that is scaled must have lost it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.scale = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.c((self.b(self.a(x)) * 2).tanh()) * self.scale

    model = Scaled().eval()
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1, ignore=["b"])
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    small.scale = 1.0
    with pytest.raises(ProofError, match=r"became 1 where the original has 0\.5"):
        surgeon.verify(model, small, plan, X)


class Scaled(nn.Module):
    """Embeddings scaled by the root of their width, which torch's layer knows (Kang and McAuley, 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.place, self.last = nn.Embedding(20, 16), nn.Embedding(9, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids) * self.items.embedding_dim**0.5 + self.place(torch.arange(ids.shape[1]))
        return self.last(x.relu())


def test_a_scale_by_the_width_of_a_layer_stays() -> None:
    model, ids = Scaled().eval(), torch.arange(6)[None]
    surgery = surgeon.inspect(model, ids)
    small, plan = surgery.cut(0.5, round_to=1)
    assert small.items.embedding_dim == 8
    assert any(edit.kind == "use" and (edit.old, edit.new) == (8, 16) for edit in plan.edits)
    proof = surgeon.verify(model, small, plan, ids)
    assert proof.error < 1e-12 and not proof.rescaled
