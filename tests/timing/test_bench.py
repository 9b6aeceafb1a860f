"""bench: the arithmetic on fake clocks, the conditions on tiny models; no real time is asserted."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import BenchError
from surgeon.onnx.export import export
from surgeon.timing import sampling
from surgeon.timing.bench import bench
from surgeon.timing.table import Row, Table

module = importlib.import_module("surgeon.timing.bench")  # the package may name the function as the module


class _Clock:
    """Advances only when a `_Timed` model runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Timed(nn.Module):
    """Takes the next of the given times (seconds) at each run after `skip` untimed ones."""

    def __init__(
        self, clock: _Clock, times: Iterator[float], log: list[Any] | None = None, skip: int = 1
    ) -> None:
        super().__init__()
        self.clock, self.times, self.log, self.skip = clock, times, log, skip

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled() and not self.training and not gc.isenabled()
        if self.log is not None:
            self.log.append(self)
        if self.skip:
            self.skip -= 1
        else:
            self.clock.now += next(self.times)
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    fake = _Clock()
    monkeypatch.setitem(sampling.CLOCKS, "wall", fake)
    return fake


_X = torch.ones(2, 3)


def test_ratio_is_the_median_of_paired_rounds(clock: _Clock) -> None:
    reference = [0.010, 0.020, 0.030, 0.040, 0.050, 0.060, 0.070]
    other = [0.005, 0.010, 0.010, 0.010, 0.020, 0.010, 0.100]  # ratios 2, 2, 3, 4, 2.5, 6, 0.7
    models = {"a": _Timed(clock, iter(reference)), "b": _Timed(clock, iter(other))}
    table = bench(models, _X, repeats=7, warmup=0)
    a, b = table.rows
    assert (a.name, a.ratio, a.low, a.high, a.gain) == ("a", None, None, None, False)
    assert a.p50 == pytest.approx(40.0) and b.p50 == pytest.approx(10.0)
    assert b.ratio == pytest.approx(2.5)
    assert b.low is not None and b.high is not None and 0.7 <= b.low < 2.5 < b.high <= 6.0 + 1e-9
    assert a.samples == b.samples == table.rounds == 7


def test_order_alternates_after_the_warm_up(clock: _Clock) -> None:
    log: list[Any] = []
    models = {name: _Timed(clock, itertools.repeat(0.01), log, skip=3) for name in "abc"}
    bench(models, _X, repeats=3, warmup=2)
    names = {id(model): name for name, model in models.items()}
    assert "".join(names[id(model)] for model in log) == "abc" + "aabbcc" + "abc" + "cba" + "abc"


def test_a_gain_needs_the_whole_interval_above_one(clock: _Clock) -> None:
    noisy = itertools.cycle([0.005, 0.020])  # ratios 2 and 0.5
    table = bench(
        {
            "reference": _Timed(clock, itertools.repeat(0.010)),
            "noisy": _Timed(clock, noisy),
            "faster": _Timed(clock, itertools.cycle([0.0080, 0.0081])),
            "slower": _Timed(clock, itertools.repeat(0.011)),
            "same": _Timed(clock, itertools.repeat(0.010)),
        },
        _X, repeats=30, warmup=0,
    )  # fmt: skip
    by_name = {row.name: row for row in table.rows}
    noisy_row = by_name["noisy"]
    assert noisy_row.low is not None and noisy_row.high is not None and noisy_row.low <= 1.0 <= noisy_row.high
    assert {name: row.gain for name, row in by_name.items()} == {
        "reference": False, "noisy": False, "faster": True, "slower": False, "same": False,
    }  # fmt: skip
    assert by_name["same"].low == pytest.approx(1.0) and by_name["slower"].ratio == pytest.approx(10 / 11)


def test_disturbances_that_last_widen_the_interval() -> None:
    """The same ratios in runs of neighbours are less evidence than in turns."""

    def width(ratios: list[float]) -> float:
        times = np.array(ratios)
        row = sampling.filled(Row("b", "x", None, 0), 1 / times, np.ones(len(times)), 0)
        return row.high - row.low

    generator = np.random.default_rng(0)
    apart = list(1 + 0.1 * generator.standard_normal(60))
    assert width(sorted(apart)) > 1.3 * width(apart)


def test_too_few_rounds_are_no_evidence(clock: _Clock) -> None:
    models = {"a": _Timed(clock, itertools.repeat(0.010)), "b": _Timed(clock, itertools.repeat(0.001))}
    row = bench(models, _X, repeats=5, warmup=0).rows[1]
    assert row.ratio == pytest.approx(10.0) and row.low is None and row.high is None and not row.gain


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_high_percentiles_are_withheld(clock: _Clock, count: int, p90: bool, p99: bool) -> None:
    (row,) = bench({"a": _Timed(clock, itertools.count(0.001, 0.001))}, _X, repeats=count, warmup=0).rows
    assert row.p50 == pytest.approx((count + 1) / 2)
    assert (row.p90 is not None, row.p99 is not None) == (p90, p99)
    if row.p90 is not None:
        assert row.p90 == pytest.approx(1 + 0.9 * (count - 1))
    if row.p99 is not None:
        assert row.p99 == pytest.approx(1 + 0.99 * (count - 1))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.onnx"
    export(nn.Linear(3, 4), path, torch.randn(2, 3))
    return path


def test_modules_and_files(onnx_file: Path) -> None:
    threads = torch.get_num_threads()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    table = bench(
        {"[red]torch": model, "file": str(onnx_file), "path": onnx_file},
        _X,
        threads=1,
        batch_size=5,
        repeats=6,
        warmup=1,
    )
    assert torch.get_num_threads() == threads and gc.isenabled() and not torch.is_inference_mode_enabled()
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert (table.threads, table.batch_size, table.rounds, table.warmup) == (1, 5, 6, 1)
    assert table.torch == torch.__version__ and table.onnxruntime and table.cpu
    assert table.isa == torch.backends.cpu.get_cpu_capability()
    assert [row.provider for row in table.rows] == [
        "torch eager",
        "CPUExecutionProvider",
        "CPUExecutionProvider",
    ]
    first, second, _ = table.rows
    assert (
        first.params == 12 + 4 + 8 and first.size_bytes == 4 * (24 + 8) + 8
    )  # and the int64 counter of the norm
    assert second.params is None and second.size_bytes == onnx_file.stat().st_size
    assert all(row.p50 > 0 and row.p90 is None and row.p99 is None for row in table.rows)


def test_dict_inputs_are_matched_by_name(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b.sum(1, keepdim=True)

    export(Two(), tmp_path / "two.onnx", {"a": torch.randn(2, 3), "b": torch.randn(2, 4)})
    inputs = {"b": torch.randn(2, 4), "a": torch.randn(2, 3)}
    assert len(bench({"torch": Two(), "onnx": tmp_path / "two.onnx"}, inputs, repeats=1, warmup=0).rows) == 2


def test_a_model_may_write_into_the_lists_it_is_given() -> None:
    class Pathways(nn.Module):
        def forward(self, x: list[Tensor]) -> Tensor:
            first = x.pop()
            x[0] = x[0] + first
            return x[0]

    inputs = ([torch.zeros(2, 3), torch.ones(2, 3)],)
    assert bench({"it": Pathways()}, inputs, repeats=3, warmup=2).rounds == 3
    assert len(inputs[0]) == 2 and not inputs[0][0].any()


def test_inputs_are_found_from_the_first_module(onnx_file: Path) -> None:
    assert bench({"file": onnx_file, "torch": nn.Linear(3, 4)}, repeats=1, warmup=0).batch_size == 1


def _table() -> Table:
    rows = (
        Row("[red]a|b", "torch eager", 1234, 4936, samples=64, p50=1.5, p90=2.25),
        Row(
            "c",
            "CPUExecutionProvider",
            None,
            99,
            samples=64,
            p50=0.5,
            p90=0.75,
            ratio=3.0,
            low=2.5,
            high=3.5,
            gain=True,
        ),
        Row("d", "torch eager", 7, 28, samples=64, p50=1.4, p90=2.0, ratio=1.07, low=0.9, high=1.2),
    )
    return Table(rows, 8, 2, 64, 5, "Some CPU", "AVX2", "2.13", "1.31")


def test_rendering() -> None:
    text, markdown = str(_table()), _table().markdown()
    for shown in (text, markdown):
        for part in (
            "2.250",
            "1,234",
            "3.00x [2.50, 3.50]",
            "1.07x [0.90, 1.20]",
            "reference",
            "Some CPU (AVX2)",
            "2 threads",
        ):
            assert part in shown
        flat = " ".join(shown.split())  # the caption is wrapped
        assert "batch 8" in flat and "torch 2.13" in flat and "onnxruntime 1.31" in flat
    assert "[red]a|b" in text and "[red]a\\|b" in markdown  # no markup is taken from names
    lines = markdown.splitlines()
    assert (
        lines[2].split(" | ")[4] == "-"
        and lines[3].split(" | ")[6] == "yes"
        and lines[4].split(" | ")[6] == "no"
    )
    assert len(_table().rich().rows) == 3


def test_to_dict_is_plain() -> None:
    data = json.loads(json.dumps(_table().to_dict()))
    assert data["rows"][1]["ratio"] == 3.0 and data["rows"][0]["p99"] is None and data["isa"] == "AVX2"


def test_bad_inputs(tmp_path: Path, onnx_file: Path) -> None:
    (tmp_path / "corrupt.onnx").write_bytes(b"not a model")
    model = nn.Linear(3, 4)
    bad: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("no entries", {}, _X, {}),
        ("no entries", [model], _X, {}),
        ("is a int", {"a": 3}, _X, {}),
        ("no such file", {"a": tmp_path / "missing.onnx"}, _X, {}),
        ("not an ONNX file", {"a": tmp_path / "corrupt.onnx"}, _X, {}),
        ("'b' does not run", {"a": nn.Identity(), "b": model}, torch.ones(2, 4), {}),
        ("does not run", {"a": onnx_file}, torch.ones(2, 4), {}),
        ("does not run", {"a": onnx_file}, _X.double(), {}),
        ("cannot be fed", {"a": onnx_file}, (_X, _X), {}),
        ("no example inputs", {"a": onnx_file}, None, {}),
        ("no tensor", {"a": model}, "text", {}),
        ("repeats is 0", {"a": model}, _X, {"repeats": 0}),
        ("repeats is 1.5", {"a": model}, _X, {"repeats": 1.5}),
        ("warmup is -1", {"a": model}, _X, {"warmup": -1}),
        ("threads is 0", {"a": model}, _X, {"threads": 0}),
        ("batch_size is 0", {"a": model}, _X, {"batch_size": 0}),
        ("on meta", {"a": nn.Linear(3, 4, device="meta")}, _X, {}),
    ]
    threads = torch.get_num_threads()
    for match, models, inputs, options in bad:
        with pytest.raises(BenchError, match=match):
            bench(models, inputs, **options)
    assert torch.get_num_threads() == threads and gc.isenabled() and model.training
