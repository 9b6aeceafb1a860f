"""Latency as a budget: kernels as the graph says them, a table on disk, a prediction, a knapsack, and the
search.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import BudgetError, InputError
from surgeon.latency import kernels as timing
from surgeon.latency.kernels import Kernel, kernels
from surgeon.latency.predict import LatencyTable, Predictor
from surgeon.latency.search import Stopwatch, search
from surgeon.selection.cost import nothing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.d = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.b, self.head = nn.Conv2d(32, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.d(self.a(x).relu()).relu()).relu().mean((2, 3)))


X = torch.randn(2, 3, 16, 16)


@pytest.fixture
def surgery() -> surgeon.Surgery:
    torch.manual_seed(0)
    return surgeon.inspect(Net().eval(), X)


def by_macs(todo: Sequence[Kernel]) -> list[float]:
    """A machine that takes a microsecond, and another for every thousand MACs."""
    times = []
    for kernel in todo:
        if kernel.kind == "matmul":
            macs = math.prod(kernel.x) * kernel.w[-1]
        else:
            places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(
                kernel.x[2:], kernel.padding, kernel.dilation, kernel.w[2:], kernel.stride, strict=True
            )]  # fmt: skip
            macs = kernel.x[0] * math.prod(places) * math.prod(kernel.w)
        times.append(1e-3 + macs * 1e-6)
    return times


def table(path: Path, timer: Callable[[Sequence[Kernel]], list[float]] = by_macs) -> LatencyTable:
    return LatencyTable(path=path / "table.json", timer=timer)


def test_kernels_are_what_the_graph_runs(surgery: surgeon.Surgery) -> None:
    found = list(itertools.chain(*kernels(surgery.shapes, nothing(surgery.solution))))
    assert found == [
        Kernel("conv", (2, 3, 16, 16), (32, 3, 3, 3), (2, 2), (1, 1), (1, 1), 1),
        Kernel("conv", (2, 32, 8, 8), (32, 1, 3, 3), (1, 1), (1, 1), (1, 1), 32),
        Kernel("conv", (2, 32, 8, 8), (64, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1),
        Kernel("matmul", (2, 64), (64, 10)),
    ]
    assert [k.widths for k in found] == [(3, 32), (32, 32), (32, 64), (64, 10)]
    assert found[1].at(0.5, 1.0, 8) == dataclasses.replace(
        found[1], x=(2, 16, 8, 8), w=(16, 1, 3, 3), groups=16
    )
    assert found[2].at(0.25, 0.5, 16).w == (32, 16, 1, 1)  # a block at least


def test_attention_is_two_products() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    surgery = surgeon.inspect(layer, torch.randn(3, 5, 16))
    two = next(found for found in kernels(surgery.shapes, nothing(surgery.solution)) if len(found) == 2)
    assert [(k.x, k.w) for k in two] == [((3, 2, 5, 8), (3, 2, 8, 5)), ((3, 2, 5, 5), (3, 2, 5, 8))]


def test_the_table_is_measured_once(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    first, again = table(tmp_path), table(tmp_path)
    Predictor(surgery.shapes, nothing(surgery.solution), first, 10.0, 8)
    Predictor(surgery.shapes, nothing(surgery.solution), again, 10.0, 8)
    assert first.measured > 0 == again.measured
    kept = json.loads(first.path.read_text())
    assert list(kept) == [first.target]
    assert "1 threads" in first.target
    (tmp_path / "table.json").write_text("damaged")
    third = table(tmp_path)
    Predictor(surgery.shapes, nothing(surgery.solution), third, 10.0, 8)
    assert third.measured == first.measured


def test_a_prediction_is_exact_where_time_is_bilinear(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    """This machine's time is a surface of the kind that is fitted, and nothing else takes time."""
    whole = sum(by_macs(list(itertools.chain(*kernels(surgery.shapes, nothing(surgery.solution))))))
    predict = Predictor(surgery.shapes, nothing(surgery.solution), table(tmp_path), whole, 8)
    assert predict(nothing(surgery.solution)) == pytest.approx(whole)
    plan = surgery.plan({"*": 0.5}, round_to=8)
    small = surgeon.inspect(plan.apply(surgery.model), X)
    want = sum(by_macs(list(itertools.chain(*kernels(small.shapes, nothing(small.solution))))))
    choice = nothing(surgery.solution)
    for group in surgery.groups:
        choice[group.sets[:, : group.steps // 2].ravel()] = True
    assert predict(choice) == pytest.approx(want, rel=1e-6)


def test_kernels_can_be_timed() -> None:
    some = [Kernel("matmul", (4, 64), (64, 32)), Kernel("conv", (1, 16, 8, 8), (8, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1),
            Kernel("conv_transpose", (1, 4, 8, 8), (4, 6, 2, 2), (2, 2), (0, 0), (1, 1), 1),
            Kernel("conv", (1, 16, 8, 8), (16, 1, 3, 3), (1, 1), (1, 1), (1, 1), 16)]  # fmt: skip
    big = Kernel("matmul", (256, 512), (512, 512))
    for times in (
        timing.time_by_onnxruntime([*some, big], 1),
        timing.time_by_torch([*some, big], 1, torch.device("cpu"), torch.float32),
    ):
        assert len(times) == 5
        assert all(0 <= t < 1000 for t in times)
        assert times[4] > times[0]


def test_an_unknown_runtime() -> None:
    with pytest.raises(InputError, match="onnxruntime, torch"):
        surgeon.shrink(Net(), latency=0.5, runtime="tensorrt", example_inputs=X)
    with pytest.raises(InputError, match="meta device has no latency"):
        with torch.device("meta"):
            net = Net()
        surgeon.inspect(net, torch.randn(2, 3, 16, 16, device="meta")).plan(latency=0.5)


class Stream(nn.Module):
    """A residual stream through eight blocks, each with inner channels that are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.up = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
        self.down = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)


def test_a_stream_counts_for_every_layer_on_it() -> None:
    """All filters are alike, and a step of the stream saves as much as one of every block: neither is to be
    preferred by much.
    """
    surgery = surgeon.inspect(Stream(), torch.randn(2, 8))

    def even(group: Any, tensors: Any) -> Any:
        return np.ones(group.units)

    plan = surgery.plan(macs=0.5, criterion=even, scope="knapsack", round_to=1)
    stream = len(plan.kept["stem.weight"][0])
    inner = [len(plan.kept.get(f"up.{i}.weight", {}).get(0, range(32))) for i in range(8)]
    assert 18 <= stream <= 28 and all(18 <= width <= 28 for width in inner), (stream, inner)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.5, "memory": 0.95}])
def test_the_scope_knapsack_meets_budgets(surgery: surgeon.Surgery, budget: dict[str, Any]) -> None:
    plan = surgery.plan(scope="knapsack", round_to=1, **budget)
    for kind, share in budget.items():
        assert getattr(plan, kind) <= share * getattr(surgery, kind)
    kind = next(iter(budget))
    assert getattr(plan, kind) >= (next(iter(budget.values())) - 0.08) * getattr(surgery, kind)
    surgeon.verify(surgery.model, plan.apply(surgery.model), plan, X)
    with pytest.raises(InputError, match="there is none"):
        surgery.plan(0.5, scope="knapsack")


# -- the search ----------------------------------------------------------------------------------------------


class Simulated:
    """A machine whose small models take `wrong` times what is predicted, but never less than `floor` of the
    original.
    """

    def __init__(self, surgery: surgeon.Surgery, path: Path, wrong: float, floor: float = 0.0) -> None:
        self.surgery, self.predict = (
            surgery,
            Predictor(surgery.shapes, nothing(surgery.solution), table(path), 10.0, 1),
        )
        self.wrong, self.floor, self.measured, self.made = wrong, floor, list[float](), list[Any]()

    def measure(self, choice: Any) -> tuple[float, float, tuple[float, float]]:
        now = self.predict(choice) / self.predict.correction
        time = max(now * self.wrong, self.floor * 10) if choice.any() else now
        self.measured.append(time)
        return 10.0, time, (time / 10, time / 10)

    def search(self, limit: float, **others: float) -> Any:
        from surgeon.selection.choose import choose
        from surgeon.selection.request import Request

        def scores(group: Any) -> Any:
            return np.random.default_rng(len(group.name)).random(group.sets.shape) + 1

        request = Request.of(latency=f"{limit}ms", round_to=1, **others)
        costs = {"latency": self.predict, **{kind: getattr(self.surgery.shapes, kind) for kind in others}}

        def chosen() -> Any:
            self.made.append(
                choose(
                    self.surgery.groups, scores, self.surgery.shapes, request, self.surgery.links, 1, costs
                )[0]
            )
            return self.made[-1], len(self.made)  # each has a block of its own

        return search(
            chosen, self.predict, self.measure, lambda full: limit,
            lambda choice: any(self.surgery.shapes.macs(choice) > 0.97 * share * self.surgery.macs for share in others.values()),
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [1.0, 1.3, 0.8])
def test_a_wrong_prediction_is_corrected(surgery: surgeon.Surgery, tmp_path: Path, wrong: float) -> None:
    machine = Simulated(surgery, tmp_path, wrong)
    (choice, block), said = machine.search(7.0)
    assert choice is machine.made[block - 1]
    assert 0.97 * 7.0 <= said["ms"] <= 7.0
    assert said["ms"] == machine.measure(choice)[1]
    assert said["candidates"] <= 4


def test_another_budget_that_is_tighter_ends_the_search(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    machine = Simulated(surgery, tmp_path, 0.9)
    (choice, _), said = machine.search(9.0, macs=0.5)
    assert len(machine.measured) == 1 and said["ms"] < 0.97 * 9.0
    assert 0.45 * surgery.macs < surgery.shapes.macs(choice) <= 0.5 * surgery.macs


def test_what_cannot_be_reached_is_refused(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    machine = Simulated(surgery, tmp_path, 1.0, floor=0.8)
    with pytest.raises(BudgetError, match=r"no candidate[\s\S]*reaches the latency: 1\.14 times the limit"):
        machine.search(7.0)


def test_a_latency_below_the_floor_is_said_in_milliseconds(surgery: surgeon.Surgery, tmp_path: Path) -> None:
    machine = Simulated(surgery, tmp_path, 1.0)
    with pytest.raises(
        BudgetError,
        match=r"a budget of 0\.01 ms cannot be reached: 0\.\d+ ms is the least that can stay \(of 10 ms\)",
    ):
        machine.search(0.01)


def test_a_latency_on_this_machine(
    surgery: surgeon.Surgery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it at once; how long things take is a matter of the machine, so only what must hold is asked."""
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    monkeypatch.setattr(
        Stopwatch, "measure", lambda self, small=None: (10.0, 10.0 if small is None else 6.9, (0.68, 0.7))
    )
    plan = surgery.plan(latency=0.7, macs=0.9)
    assert plan.request["measured"]["ms"] == 6.9
    assert plan.request["measured"]["limit_ms"] == pytest.approx(7.0)
    assert plan.macs <= 0.9 * surgery.macs
    assert (tmp_path / "latency.json").is_file()
    surgeon.verify(surgery.model, plan.apply(surgery.model), plan, X)
    plan.save(tmp_path / "plan.json")
    assert surgeon.Plan.load(tmp_path / "plan.json").request["measured"]["ms"] == 6.9


def test_the_stopwatch_measures_what_is_deployed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    x = torch.randn(1, 3, 32, 32)
    small = surgeon.shrink(net, 0.75, example_inputs=x)
    for runtime in ("onnxruntime", "torch"):
        watch = Stopwatch(net, x, runtime, 1, str(tmp_path))
        before, after, (low, high) = watch.measure(small)
        assert 0 < low <= after / before <= high
