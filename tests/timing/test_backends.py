"""bench's backends, sweeps, details and outputs; CUDA and other providers through stand-ins, as no such
device is needed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import BenchError, MissingExtraError
from surgeon.onnx.export import export
from surgeon.timing import backends as runners
from surgeon.timing import file_backends
from surgeon.timing import ort_profile as profiled
from surgeon.timing import table as bench_table
from surgeon.timing.bench import bench
from surgeon.timing.table import Row

_X = torch.ones(2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    export(nn.Linear(3, 4), folder / "b.onnx", torch.randn(2, 3))
    export(nn.Linear(3, 5), folder / "a.onnx", torch.randn(2, 3))
    return folder


def test_modules_files_and_folders_over_batches_and_threads(folder: Path) -> None:
    models = {"torch": nn.Linear(3, 4), "file": folder / "a.onnx", "all": folder}
    table = bench(models, _X, batch_size=[1, 4], threads=[1, 2], repeats=6, warmup=1)
    assert table.batch_size == (1, 4) and table.threads == (1, 2)
    places = [(row.threads, row.batch_size) for row in table.rows]
    assert places == [place for place in ((1, 1), (1, 4), (2, 1), (2, 4)) for _ in range(4)]
    assert [row.name for row in table.rows[:4]] == ["torch", "file", "all/a", "all/b"]
    assert [row.ratio is None for row in table.rows] == [True, False, False, False] * 4
    for row in table.rows:
        assert row.throughput == pytest.approx(1e3 * row.batch_size / row.p50)
        assert row.cold_ms is not None and row.cold_ms > 0
        assert (row.load_ms is None) == (row.backend == "torch")
        assert row.nodes == ({} if row.backend == "torch" else {"CPUExecutionProvider": 1})
    assert "torch (batch 4, 2 threads)" in table.markdown()


def test_outputs(folder: Path) -> None:
    table = bench({"torch": nn.Linear(3, 4), "file": folder / "a.onnx"}, _X, repeats=6, warmup=0)
    assert json.loads(table.json())["rows"][1]["nodes"] == {"CPUExecutionProvider": 1}
    lines = table.csv().splitlines()
    assert (
        len(lines) == 3
        and lines[0].startswith("name,provider,params")
        and lines[1].startswith("torch,torch eager,16,64,6,")
    )
    assert "CPUExecutionProvider: 1" in lines[2]


def test_pandas_is_optional(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = bench({"torch": nn.Linear(3, 4)}, _X, repeats=1, warmup=0)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"surgeon-torch\[deploy\]"):
        table.frame()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    assert isinstance(table.frame(), pandas.DataFrame) and table.frame().loc[0, "params"] == 16


def test_peak_memory_counts_what_a_run_takes() -> None:
    if runners._resident(reset=True) is None:
        pytest.skip("this system does not tell")

    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(40_000_000).sum() + x

    (row,) = bench({"large": Large()}, _X, repeats=1, warmup=0).rows
    assert row.peak_bytes is not None and 140e6 < row.peak_bytes < 400e6


def test_peak_memory_counts_what_was_free() -> None:
    """The process holds much that is free, as after other models: what a run takes of that counts as well."""
    if runners._resident(reset=True) is None or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system does not tell")

    def pieces() -> list[Tensor]:
        return [torch.ones(20_000) for _ in range(1_000)]  # 80 kB each: the heap's, not pages of their own

    class Pieces(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([piece.sum() for piece in pieces()]).sum() + x

    pins = [piece for count, piece in enumerate(pieces()) if count % 10 == 0]  # between them it is free
    (row,) = bench({"pieces": Pieces()}, _X, repeats=1, warmup=0).rows
    assert len(pins) == 100 and row.peak_bytes is not None and 60e6 < row.peak_bytes < 120e6


def test_memory_that_does_not_rise_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process held enough that was free: that is not 0 bytes."""
    monkeypatch.setattr(runners, "_resident", lambda reset=False: 100)
    table = bench({"small": nn.Linear(3, 4)}, _X, repeats=1, warmup=0)
    assert table.rows[0].peak_bytes is None
    assert "peak MB" not in str(table)


def test_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile(module: nn.Module) -> Any:
        seen.append(module)
        return lambda *args: module(*args)

    monkeypatch.setattr(torch, "compile", compile)
    model = nn.Linear(3, 4)
    table = bench(
        {"a": model, "file": folder / "a.onnx"},
        _X,
        backends=["torch", "compile", "onnxruntime"],
        repeats=2,
        warmup=0,
    )
    assert [row.name for row in table.rows] == ["a [torch]", "a [compile]", "file"] and seen == [model]
    assert [row.provider for row in table.rows[:2]] == ["torch eager", "torch.compile"] and table.rows[
        1
    ].load_ms is not None

    def broken(module: nn.Module) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(BenchError, match=r"cannot be compiled(.|\n)*no C\+\+ compiler"):
        bench({"a": model}, _X, backends=["compile"])


def test_cuda_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, other: Any) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timed = file_backends.events(lambda: log.append("run"))
    assert timed(lambda: 1 / 0) == pytest.approx(0.007)  # the clock is not asked
    assert log == ["record", "run", "record", "synchronize"]


def test_bound_inputs_lie_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Binding:
        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            log.append((name, value))

        def bind_output(self, name: str, device: str) -> None:
            log.append((name, device))

        def synchronize_outputs(self) -> None:
            log.append("synchronized")

    class Session:
        def io_binding(self) -> Binding:
            return Binding()

        def get_outputs(self) -> list[Any]:
            return [type("Output", (), {"name": "y"})]

        def run_with_iobinding(self, binding: Any) -> None:
            log.append("run")

    class OrtValue:
        @staticmethod
        def ortvalue_from_numpy(array: Any, device: str, number: int) -> Any:
            return (array.shape, device, number)

    monkeypatch.setattr(onnxruntime, "OrtValue", OrtValue)
    file_backends._bound(Session(), {"x": np.ones((2, 3))})()
    assert log == [("x", ((2, 3), "cuda", 0)), ("y", "cuda"), "run", "synchronized"]


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-openvino"])
def test_absent_packages_are_named(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BenchError, match=r"not installed(.|\n)*pip install onnxruntime-"):
        bench({"a": folder / "a.onnx"}, _X, backends=[backend])
    provider = file_backends._PROVIDERS[backend][0]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    assert file_backends.providers_for(backend, "a") == [provider, "CPUExecutionProvider"]


def test_fallbacks_and_noise_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgeon.timing.bench import _warnings

    row = Row(
        "a",
        "CUDAExecutionProvider, CPUExecutionProvider",
        None,
        0,
        nodes={"CUDAExecutionProvider": 8, "CPUExecutionProvider": 2},
    )
    quiet, loud = np.full((1, 8), 1.0), np.array([[1.0, 2.0] * 4])
    assert list(_warnings([row], quiet)) == [
        "'a' asked for CUDAExecutionProvider, but 2 on CPUExecutionProvider of 10 ops"
    ]
    plain = Row("a", "CPUExecutionProvider", None, 0, nodes={"CPUExecutionProvider": 8})
    assert not list(_warnings([plain], quiet)) and "noisy" in next(iter(_warnings([plain], loud)))
    table = bench_table.Table((plain,), 1, 1, 8, 0, "CPU", "AVX2", "2", None, warnings=("it is loud",))
    assert "Warning: it is loud." in table.markdown()


def test_warm_up_ends_when_times_are_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgeon.timing.sampling import warm_up

    def runner(times: Any) -> file_backends.Runner:
        left = iter(times)
        return file_backends.Runner(Row("a", "x", None, 0), lambda: None, lambda clock: next(left))

    assert warm_up(runner([1.0] * 50), "stable", "wall") == 10
    assert warm_up(runner([9, 8, 7, 6, 5, 4, 3, 2, *[1.0] * 42]), "stable", "wall") == 16
    assert warm_up(runner([1.1**i for i in range(60)]), "stable", "wall") == 50
    assert warm_up(runner([]), 3, "wall") == 3


def test_the_blocked_path_is_seen(tmp_path: Path) -> None:
    def ops(width: int) -> list[profiled.OpTime]:
        model = nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))
        x = torch.randn(2, width, 9, 9)
        export(model, tmp_path / f"{width}.onnx", x)
        return profiled.profile(tmp_path / f"{width}.onnx", {"input": x.numpy()})

    assert profiled.blocked(ops(32)) is True
    assert profiled.blocked(ops(19)) is False
    assert profiled.blocked([]) is None


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes((folder / "a.onnx").read_bytes()[:100])
    (tmp_path / "none").mkdir()
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("unknown backend 'tpu'", {"a": model}, {"backends": ["tpu"]}),
        ("unknown backend 'torch'", {"a": model}, {"backends": "torch"}),
        ("no backend for entry 'a'", {"a": model}, {"backends": ["onnxruntime"]}),
        ("CUDA graphs need", {"a": model}, {"backends": ["cudagraph"]}),
        ("threads is 0", {"a": model}, {"threads": [1, 0]}),
        ("batch_size is empty", {"a": model}, {"batch_size": []}),
        ("warmup is 'long'", {"a": model}, {"warmup": "long"}),
        ("unknown clock", {"a": model}, {"clock": "sun"}),
        ("file is empty", {"a": tmp_path / "empty.onnx"}, {}),
        ("not an ONNX file", {"a": tmp_path / "cut.onnx"}, {}),
        ("holds no .onnx file", {"a": tmp_path / "none"}, {}),
    ]
    for match, models, options in bad:
        with pytest.raises(BenchError, match=match):
            bench(models, _X, **options)
