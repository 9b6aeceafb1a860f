"""Paths that the first run did not take: training mode, other inputs, other answers about modes, grown tables."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wrong import wrong_cuts

import surgeon
from surgeon.errors import InputError, PathWarning, ProofError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Shuffled(nn.Module):
    """While it trains it shuffles its channels, and there alone are numbers that must follow their count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.training:
            y = y.view(-1, 4, 4).mul(torch.rand(4, 1)).view(-1, 16)
        return self.b(y)


def test_numbers_that_only_training_uses() -> None:
    torch.manual_seed(0)
    model = Shuffled().eval()
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert small.a.out_features == 8
    for graph in (None, surgery.graph, surgery.runs):
        proof = surgeon.verify(model, small, plan, X, graph=graph)
        assert {*proof.errors} == {"output", "output in training mode"}
    assert small.train()(X).shape == (4, 3)


class Mixed(nn.Module):
    """In eval mode the second layer takes the mean over channels, so that it shows nothing of which of them
    are which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(6, 8), nn.Parameter(torch.randn(8)), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        if self.training:
            y = y * self.scale
        return self.b(y.mean(1, keepdim=True)) + self.scale.sum()


def test_wrong_cuts_that_only_training_shows() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    tried = 0
    for wrong, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, X)
        tried += 1
    assert tried == 3
    surgeon.verify(model, wrong, bad, graph=[surgery.graph])  # one of the scale: eval mode takes it for right


def test_weights_that_training_bounds_come_back() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.a.weight.data.clamp_(-0.01, 0.01)
            return self.b(self.norm(self.a(x)))

    model = Bounded()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5)
    small = plan.apply(model)
    cut = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    surgeon.verify(model, small, plan, X)
    assert len(surgery.runs) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, cut[name]) for name, tensor in small.state_dict().items())


def test_a_training_run_that_fails_is_said() -> None:
    class Targets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return self.b(self.a(x))

    surgery = surgeon.inspect(Targets(), X)
    assert len(surgery.runs) == 1
    assert any(
        "only eval mode was seen" in remark and "targets are missing" in remark for remark in surgery.remarks
    )
    with pytest.warns(PathWarning, match="targets are missing"):
        surgeon.shrink(Targets(), 0.5, example_inputs=X)


class Flips(nn.Module):
    """Takes its hidden channels backwards where `asks` says so, which ties each with another one."""

    def __init__(self, asks: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.asks = nn.Linear(6, 8), nn.Linear(8, 3), asks

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tanh(self.a(x))
        return self.b(t.flip(1) if self.asks(self, x) else t)


def is_big(x: Tensor) -> bool:
    return x.shape[0] > 16


def named_after(x: Tensor) -> str:
    return f"{x.shape[0]}x6"


def off(model: nn.Module, plan: surgeon.Plan, small: nn.Module, x: Tensor) -> float:
    """How far a small model is from the original in which all that was removed is zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in masked.named_parameters():
            for dim, kept in plan.kept.get(name, {}).items():
                gone = sorted(set(range(tensor.shape[dim])) - set(kept))
                tensor.index_fill_(dim, torch.tensor(gone), 0)
        return float((small(x) - masked(x)).abs().max())


MORE = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("asks", "other", "named"),
    [
        (lambda s, x: x.mean() > 1, X + 3, "by a value"),
        (lambda s, x: x.mean().item() > 1, X + 3, "read from a tensor"),
        (lambda s, x: torch.equal(x[0], x[1]), X[:1].repeat(4, 1), "by a value"),
        (lambda s, x: bool((s.b.bias > 5).any()), X, "by a value"),
        (lambda s, x: is_big(x), MORE, "4 > 16"),
        (lambda s, x: x.shape[0] % 4, MORE[:5], r"a size \(0\)"),
        (lambda s, x: x.size(0) + 1 in (7, 8), MORE[:7], "5 == 7"),
        (lambda s, x: x.shape[0] / 2 > 8, MORE, r"2\.0 > 8"),
        (lambda s, x: len(x) > 5, MORE, "length 4"),
        (lambda s, x: x.numel() > 100, MORE, "24 > 100"),
        (lambda s, x: x.shape[0] in {7, 9}, MORE[:7], r"a size \(4\)"),
        (lambda s, x: math.ceil(x.shape[0] / 6) == 2, MORE[:7], "1 == 2"),
        (lambda s, x: round(x.shape[0] / 2) + 1 > 4, MORE[:8], "3 > 4"),
        (lambda s, x: int(math.sqrt(x.shape[0] + 2)) == 3, MORE[:7], r"a size \(6\)"),
        (lambda s, x: max(x.shape[0], 6) == 7, MORE[:7], "4 < 6"),
        (lambda s, x: x.shape[0] & 1, MORE[:7], r"a size \(0\)"),
        (lambda s, x: x.shape[0] >> 1 == 3, MORE[:7], "2 == 3"),
        (lambda s, x: len(x.split(5)) > 1, MORE[:7], "1 parts"),
        (lambda s, x: len(x.unbind(0)) > 6, MORE[:7], "4 parts"),
        (lambda s, x: (x > 50).nonzero().shape[0] > 0, X + 99, "0 > 0"),
        (lambda s, x: torch.allclose(x[0], x[1]), X[:1].repeat(4, 1), "by a value"),
        (lambda s, x: max(x.flatten().tolist()) > 50, X + 99, "left torch by tolist"),
        (lambda s, x: x.numpy().max() > 50, X + 99, "left torch by numpy"),
        (lambda s, x: {7: 1}.get(x.shape[0]) == 1, MORE[:7], r"a size \(4\)"),
        (lambda s, x: str(x.shape[0]) == "7", MORE[:7], r"a size \(4\)"),
        (lambda s, x: named_after(x) in ("7x6",), MORE[:7], r"a size \(4\)"),
        (lambda s, x: {4: 0, 7: 1}[x.shape[0]], MORE[:7], r"a size \(4\)"),
        (lambda s, x: torch.tensor(x.shape).sum() > 12, MORE[:7], "by a value"),
    ],
)  # fmt: skip
def test_a_decision_is_said_and_the_other_way_can_be_given(asks: Any, other: Tensor, named: str) -> None:
    model = Flips(asks).eval()
    with pytest.warns(PathWarning, match=rf"{named}.*test_paths\.py:\d+"):
        surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
    surgery = surgeon.inspect(model, surgeon.Calls([X, other]))
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, [X, other])
    assert {name for name in proof.errors if not name.startswith("values read")} == {
        "output",
        "output of call 2",
    }
    assert max(off(model, plan, small, X), off(model, plan, small, other)) < 1e-6


@pytest.mark.parametrize(
    "asks",
    [
        lambda s, x: s.training,
        lambda s, x: getattr(s.a, "training"),  # noqa: B009  # as code that takes the name from elsewhere
        lambda s, x: torch.is_grad_enabled(),
        lambda s, x: torch.is_autocast_enabled("cpu"),
        lambda s, x: torch.jit.is_scripting(),
        lambda s, x: torch.compiler.is_compiling(),
    ],
)
def test_modes_are_recorded_both_ways(asks: Any) -> None:
    model = Flips(asks).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PathWarning)
        surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert len(surgery.runs) == 2
    assert list(plan.kept["a.weight"][0]) == sorted(7 - i for i in plan.kept["a.weight"][0])
    assert len(surgeon.verify(model, small, plan, X).errors) == 2


def test_modes_come_back_and_only_the_users_code_is_told() -> None:
    before = torch.is_grad_enabled, torch.jit.is_scripting
    surgeon.inspect(Flips(lambda s, x: torch.is_grad_enabled()).eval(), X)
    assert (torch.is_grad_enabled, torch.jit.is_scripting) == before


@pytest.mark.parametrize(
    "asks",
    [
        lambda s, x: False,
        lambda s, x: torch.jit.is_scripting() and False,
        lambda s, x: None if max(x.shape[0], 2) is None else False,
        lambda s, x: s.a(x).shape[1] == 7,  # its own width
    ],
)
def test_nothing_is_said_without_another_way(asks: Any) -> None:
    surgery = surgeon.inspect(Flips(asks).eval(), X)
    assert not surgery.unseen


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (X - 9, r"no entry was selected at .*test_paths\.py:\d+"),
        (X[:0], r"an input has no entries \(its shape is \(0, 6\)\)"),
    ],
    ids=["nothing selected", "an empty input"],
)
def test_what_is_computed_of_nothing_shows_nothing(x: Tensor, said: str) -> None:
    """As in a detector that finds nothing: torch leaves out what a batch norm would do, so that no op ties its tensors."""

    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(self.a(x)), self.b(self.norm(self.a(x[x[:, 0] > 0])))

    torch.manual_seed(0)
    with pytest.warns(PathWarning, match=said):
        surgeon.shrink(Finds().eval(), 0.5, example_inputs=x, round_to=1)
    assert not surgeon.inspect(Finds().eval(), X).unseen


def test_a_sum_over_nothing_is_proved() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)).eval()
    with pytest.warns(PathWarning, match="no entries"):
        assert surgeon.shrink(model, 0.5, example_inputs=X[:0], round_to=1)[0].out_features == 4


def test_checks_show_no_other_path() -> None:
    class Checks(Flips):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[0] < 100
            torch._assert(x.shape[1] == 6, "six")
            if x.shape[0] > 50:
                raise ValueError("too many")
            if torch.isnan(x).any():
                warnings.warn("not a number", stacklevel=2)
            return super().forward(x)

    assert not surgeon.inspect(Checks(lambda s, x: False).eval(), X).unseen


def test_python_draws_are_said() -> None:
    surgery = surgeon.inspect(Flips(lambda s, x: random.random() > 2).eval(), X)
    assert any("Python's random" in path for path in surgery.unseen)


def test_plain_layers_have_one_run() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)
    )
    surgery = surgeon.inspect(model.eval(), torch.randn(2, 3, 8, 8))
    assert len(surgery.runs) == 1
    assert not surgery.remarks


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.a(x).relu()
        return self.b(y if scale is None else y * scale)


def test_what_counts_as_several_calls() -> None:
    scale = torch.ones(1)
    for calls in (
        surgeon.Calls([X, (X, scale)]),
        [(X,), (X, scale)],
        [{"x": X}, {"x": X, "scale": scale}],
        [X, X, X],
    ):
        surgery = surgeon.inspect(Several(), calls)
        assert [run.number for run in surgery.runs] == list(range(1, len(calls) + 1))
    surgery = surgeon.inspect(Several(), [X, scale])
    assert len(surgery.runs) == 1
    assert any("positional arguments of one call" in remark for remark in surgery.remarks)
    with pytest.raises(InputError, match="no call"):
        surgeon.Calls([])
    with pytest.raises(InputError, match="2 calls"):
        surgeon.fuse(Several().eval(), surgeon.Calls([X, X]))


# -- tables that the code makes anew -------------------------------------------------------------------------


class Encoded(nn.Module):
    """Adds a table of positions by channels, which `kind` keeps and makes in one of the ways of public code."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.width = kind, 16
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.table: Any = None
        self.tables: dict[int, Tensor] = {}
        if "buffer" in kind:
            del self.table
            self.register_buffer("table", self.made(4), persistent="kept" in kind)

    def made(self, length: int) -> Tensor:
        return torch.sin(torch.arange(self.width) + torch.arange(length)[:, None])

    def grow(self, length: int) -> None:
        self.register_buffer("table", self.made(length), persistent="kept" in self.kind)

    def positions(self, x: Tensor) -> Tensor:
        if self.kind == "dict":
            if x.shape[1] not in self.tables:
                self.tables[int(x.shape[1])] = self.made(x.shape[1])
            return self.tables[int(x.shape[1])]
        if "buffer" in self.kind:
            if x.shape[1] > self.table.shape[0]:
                self.grow(x.shape[1])
            return self.table[: x.shape[1]]
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = self.made(x.shape[1])
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(self.b((y + self.positions(y)).relu()).relu())


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", ["attribute", "dict", "buffer", "kept buffer"])
def test_a_table_that_the_code_makes_anew_stays_whole(kind: str, ran: bool) -> None:
    model = Encoded(kind).eval()
    x, longer = torch.randn(2, 4, 6), torch.randn(2, 9, 6)
    if ran:
        model(x)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    assert "a.weight" not in plan.kept
    assert len(plan.kept["b.weight"][0]) == 6
    assert off(model, plan, small, longer) < 1e-6
    if ran and "buffer" in kind:
        assert any("makes anew" in group.reason for group in surgery.frozen)


def test_a_running_mean_is_no_such_table() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mean", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            return self.b((y - self.mean).relu())

    plan = surgeon.inspect(Centred(), X).plan(0.5, round_to=1)
    assert len(plan.kept["mean"][0]) == 4


def test_autocast_around_a_call_changes_nothing() -> None:
    model = Several().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            small = surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
            assert small.a.out_features == 4
        plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
        surgeon.verify(model, plan.apply(model), plan, X)
        assert torch.is_autocast_enabled("cpu")


def test_code_that_decides_by_the_dtype_is_proved() -> None:
    model = Flips(lambda s, x: x.dtype == torch.float64).eval()
    surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
