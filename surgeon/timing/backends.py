"""Runners: one entry of a benchmark on one backend, loaded, run once, and ready to be timed.

Backends of modules: "torch" (eager, where the weights are), "compile" (torch.compile with inductor),
"cudagraph". Of files: "onnxruntime" (CPU), "onnxruntime-cuda", "onnxruntime-tensorrt",
"onnxruntime-openvino".
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.capture.model_state import copies, output_of
from surgeon.errors import BenchError
from surgeon.files import silence
from surgeon.onnx.compare import Inputs
from surgeon.timing.file_backends import Runner, clocked, events, file_runner, reason, with_nodes
from surgeon.timing.table import Row

MODULE_BACKENDS = ("torch", "compile", "cudagraph")


def open_entry(name: str, entry: Any, backend: str, inputs: Inputs, threads: int, details: bool) -> Runner:
    """An entry that has run once.

    Raises:
        BenchError: its file is missing or damaged, its backend's package is not installed, or it does not run
            on the inputs.
    """
    before = _resident(reset=True)
    if isinstance(entry, nn.Module):
        runner = _module(name, entry, backend, inputs)
    else:
        runner = file_runner(name, Path(entry), backend, inputs, threads)
    start = time.perf_counter()
    try:
        runner.run()
    except Exception as error:  # the model's own code or ONNX Runtime's own classes: all of it is reported
        fix = "pass example_inputs that fit every entry; a file of fixed batch needs that batch"
        raise BenchError(f"entry '{name}' does not run on the inputs", why=reason(error), fix=fix) from error
    cold = (time.perf_counter() - start) * 1e3
    after = _resident()
    peak = after - before if before is not None and after is not None and after > before else None
    if isinstance(entry, nn.Module) and torch.cuda.is_available() and _device(entry).type == "cuda":
        peak = torch.cuda.max_memory_allocated(_device(entry))
    row = dataclasses.replace(runner.row, cold_ms=cold, peak_bytes=peak, backend=backend)
    if details and runner.fed is not None:
        row = with_nodes(row, Path(entry), runner.fed, threads)
    return dataclasses.replace(runner, row=row)


# -- modules -------------------------------------------------------------------------------------------------


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _call(what: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], Any]:
    """Runs a model on the same inputs; those that it writes into, as the first run shows, are copied for each
    run.
    """
    writes: bool | None = None

    def run() -> Any:
        nonlocal writes
        if writes is None:
            given = copies((args, kwargs))
            out = what(*given[0], **given[1])
            writes = _differ(given, (args, kwargs))
            return out
        return output_of(what, args, kwargs) if writes else what(*args, **kwargs)

    return run


def _differ(given: Any, inputs: Any) -> bool:
    after, before = pytree.tree_leaves(given), pytree.tree_leaves(inputs)
    if len(after) != len(before):
        return True
    return any(
        not torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is not b
        for a, b in zip(after, before, strict=True)
    )


def _module(name: str, module: nn.Module, backend: str, inputs: Inputs) -> Runner:
    tensors = [*module.parameters(), *module.buffers()]
    device = _device(module)
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != device:
            fix = "move all of the model to one device: model.cpu() or model.cuda()"
            raise BenchError(
                f"entry '{name}' is on {tensor.device}",
                why="only one CPU or CUDA device is measured",
                fix=fix,
            )
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def placed(value: Tensor) -> Tensor:
        half = dtype in (torch.float16, torch.bfloat16) and value.dtype is torch.float32
        return value.to(device, dtype if half else value.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, placed, inputs)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    params = sum(parameter.numel() for parameter in module.parameters())
    where = "" if device.type == "cpu" else f", {torch.cuda.get_device_name(device)}"
    row, load, kind = Row(name, f"torch eager{where}", params, size), None, device.type

    run = _call(module, args, kwargs)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if backend == "compile":
        compiled, start = torch.compile(module), time.perf_counter()
        run = _call(compiled, args, kwargs)
        try:
            with silence():
                run()
        except Exception as error:  # inductor, its C++ compiler, or the model: all of it is reported
            fix = "bench it with the backend 'torch'; inductor needs a C++ compiler"
            raise BenchError(f"entry '{name}' cannot be compiled", why=reason(error), fix=fix) from error
        load, row = (
            (time.perf_counter() - start) * 1e3,
            dataclasses.replace(row, provider=f"torch.compile{where}"),
        )
    elif backend == "cudagraph":
        if kind != "cuda":
            raise BenchError(
                f"entry '{name}' is on {device}",
                why="CUDA graphs need a CUDA device",
                fix="call model.cuda()",
            )
        run, row = _graph(run).replay, dataclasses.replace(row, provider=f"CUDA graph{where}")
    return Runner(
        dataclasses.replace(row, load_ms=load), run, events(run) if kind == "cuda" else clocked(run)
    )


def _graph(run: Callable[[], Any]) -> Any:
    """A CUDA graph of one run, after a few on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def files_in(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of an entry that is a path: all ONNX files of a folder, or itself.

    Raises:
        BenchError: the folder holds none.
    """
    if not os.path.isdir(path):
        yield name, path
        return
    found = sorted(path.glob("*.onnx"))
    if not found:
        raise BenchError(
            f"entry '{name}': the folder holds no .onnx file",
            where=str(path),
            fix="export the models into it first",
        )
    for file in found:
        yield f"{name}/{file.stem}", file


def _resident(reset: bool = False) -> int | None:
    """Bytes of this process in memory now (`reset`: from here on the peak is counted anew), or at the peak
    since then. Memory that was freed and kept for later is handed back first: a run that takes it again counts.
    """
    try:
        if reset:
            _hand_back()
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux, or not allowed
        return None
    found = re.search(rf"{'VmRSS' if reset else 'VmHWM'}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def _hand_back() -> None:
    """Give what the allocator keeps back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
