"""An ONNX file and inputs -> a `Runner` that times it in ONNX Runtime, on the CPU or another provider."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import BenchError, FileError, SurgeonError
from surgeon.onnx.compare import Inputs, feeds
from surgeon.onnx.file import open_session, read, size_on_disk
from surgeon.timing.ort_profile import blocked, profile, providers_of
from surgeon.timing.table import Row

_PROVIDERS = {
    "onnxruntime": ("CPUExecutionProvider", "onnxruntime"),
    "onnxruntime-cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu (and TensorRT)"),
    "onnxruntime-openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
FILE_BACKENDS = tuple(_PROVIDERS)
Timed = Callable[[Callable[[], float]], float]  # (clock) -> seconds of one run


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """What is known before any timing; one run; and how a run is timed."""

    row: Row
    run: Callable[[], Any]
    timed: Timed
    fed: dict[str, Any] | None = None  # of a file: its inputs


def clocked(run: Callable[[], Any]) -> Timed:
    """One run by the clock that is given."""

    def timed(now: Callable[[], float]) -> float:
        start = now()
        run()
        return now() - start

    return timed


def events(run: Callable[[], Any]) -> Timed:
    """One run by CUDA events; the clock does not matter."""

    def timed(now: Callable[[], float]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    return timed


# -- files ---------------------------------------------------------------------------------------------------


def providers_for(backend: str, name: str) -> list[str]:
    """The execution providers of a backend, the CPU last.

    Raises:
        BenchError: its package is not installed.
    """
    import onnxruntime

    provider, package = _PROVIDERS[backend]
    if provider not in onnxruntime.get_available_providers():
        have = ", ".join(onnxruntime.get_available_providers())
        fix = f"pip install {package}; it takes the place of onnxruntime"
        raise BenchError(
            f"entry '{name}': the backend {backend} is not installed", why=f"ONNX Runtime has {have}", fix=fix
        )
    return list(dict.fromkeys([provider, "CPUExecutionProvider"]))


def file_runner(name: str, path: Path, backend: str, inputs: Inputs, threads: int) -> Runner:
    try:
        proto = read(path)
    except FileError as error:
        raise BenchError(
            f"entry '{name}': {error.what}", where=error.where, why=error.why, fix=error.fix
        ) from error
    providers = providers_for(backend, name)
    start = time.perf_counter()
    try:
        session = open_session(path, threads, providers)
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        what, fix = (
            f"entry '{name}' is not an ONNX file that ONNX Runtime can load",
            "write it anew with surgeon.export(...)",
        )
        raise BenchError(what, where=str(path), why=reason(error), fix=fix) from error
    load = (time.perf_counter() - start) * 1e3
    fed = _feeds(name, path, inputs, session)
    row = Row(name, ", ".join(session.get_providers()), None, size_on_disk(path, proto), load_ms=load)
    run = (
        _bound(session, fed)
        if backend in ("onnxruntime-cuda", "onnxruntime-tensorrt")
        else lambda: session.run(None, fed)
    )
    return Runner(row, run, clocked(run), fed)


def _feeds(name: str, path: Path, inputs: Inputs, session: Any) -> dict[str, Any]:
    try:
        return feeds(inputs, session.get_inputs())
    except SurgeonError as error:
        fix = "pass example_inputs with one tensor for each input of the file, of its dtype"
        raise BenchError(f"entry '{name}' cannot be fed", where=str(path), why=str(error), fix=fix) from error


def _bound(session: Any, fed: dict[str, Any]) -> Callable[[], Any]:
    """A run whose inputs lie on the device and whose outputs stay there; it returns when they are
    computed.
    """
    import onnxruntime

    binding = session.io_binding()
    for key, array in fed.items():
        binding.bind_ortvalue_input(key, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for item in session.get_outputs():
        binding.bind_output(item.name, "cuda")

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def with_nodes(row: Row, path: Path, fed: dict[str, Any], threads: int) -> Row:
    """The row with what ran each op, by one profiled run of another session."""
    providers = providers_for(row.backend, row.name)
    ops = profile(path, fed, threads=threads, providers=providers)
    nchwc = blocked(ops) if providers == ["CPUExecutionProvider"] else None
    return dataclasses.replace(row, nodes=providers_of(ops), nchwc=nchwc)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"
