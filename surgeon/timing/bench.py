"""bench({name: module, ONNX file or folder}) -> a Table of latencies, measured in turns, with ratios to the
first entry.

Every round runs every entry once, forwards then backwards (A B C, C B A, ...), so that drift of the machine
hits all alike. A ratio is the median over rounds of reference time / entry time, with a bootstrap 95 %
interval; it is a gain only if the whole interval is above 1. High percentiles are withheld until there are
enough samples to estimate them.

Where a session's memory happens to lie makes it up to a percent faster or slower. Every file is therefore
opened twice, the second time in the other order, and the two take turns.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from surgeon.capture.inputs import find_inputs, normalize
from surgeon.errors import BenchError, SurgeonError
from surgeon.onnx.compare import Inputs, batch_size_of, with_batch
from surgeon.timing.backends import MODULE_BACKENDS, files_in, open_entry
from surgeon.timing.file_backends import FILE_BACKENDS
from surgeon.timing.sampling import CLOCKS, INTERVAL_ROUNDS, filled, placed, sample, twin, warm_up
from surgeon.timing.table import Row, Table

__all__ = ["Row", "Table", "bench", "cpu_name"]

_MOST, _MOST_THREADS = 1 << 31, 1024
_NOISY = 0.1  # spread of one entry's times from which the machine counts as noisy


def bench(
    models: Mapping[str, nn.Module | str | os.PathLike[str]], example_inputs: Any = None, *,
    backends: Sequence[str] = ("torch", "onnxruntime"), threads: int | Sequence[int] | None = None,
    batch_size: int | Sequence[int] | None = None, repeats: int = 30, warmup: int | str = "stable", clock: str = "wall",
    seed: int = 0, details: bool = True,
) -> Table:  # fmt: skip
    """Measure the latency of modules (eval, inference mode), ONNX files and folders of such files against the
    first entry.

    Args:
        models: name -> a torch module on the CPU or on CUDA, the path of an ONNX file, or of a folder of
            them. The first one, on its first backend, is the reference.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords), for all entries; they are moved
            to where an entry runs, and floats are cast to a half-precision model's dtype. None: found from
            the first module.
        backends: what runs them: "torch", "compile" and "cudagraph" modules; "onnxruntime",
            "onnxruntime-cuda", "onnxruntime-tensorrt" and "onnxruntime-openvino" files. An entry gets a row
            for each that fits it.
        threads: intra-op threads for both runtimes, or several numbers. None: torch's current number, which
            is restored in any case.
        batch_size: repeat or cut the inputs along dim 0 to this many rows, or to several numbers of them.
        repeats: number of rounds; each times every entry once.
        warmup: untimed runs of each entry before the rounds, after one untimed run that checks it; "stable":
            until the medians of five runs and the five before them agree to 2 % (at most 50 runs or 5 s).
        clock: "wall", or "cpu" for the time that this process spends on processors: on a busy machine it says
            for one thread what the wall clock would say on a quiet one. On CUDA, modules are timed by events.
        seed: of the bootstrap.
        details: say which execution provider ran each op of a file, by one more run that is profiled.

    Returns:
        A `Table`, one row for each entry and backend in the given order, for each batch size and number of
        threads.

    Raises:
        BenchError: an entry, option or number is bad, a file is missing or damaged, a backend's package is
            not installed, or an entry does not run on the inputs.
    """
    if clock not in CLOCKS:
        raise BenchError(f"unknown clock {clock!r}", fix=f"use one of {', '.join(CLOCKS)}")
    _check_numbers(models, threads=threads, batch_size=batch_size, repeats=repeats, warmup=warmup)
    jobs = list(_jobs(models, backends))
    inputs = _inputs(models, example_inputs)
    rows: list[Row] = []
    warned: list[str] = []
    warmed: list[int] = []
    counts = _several(threads)
    for count in counts:
        for size in _several(batch_size):
            fitted = inputs if size is None else with_batch(inputs, size)
            with _conditions(models, count) as used:
                runners = [open_entry(*job, fitted, used, details) for job in jobs]
                twins = [
                    twin(runner, job, fitted, used)
                    for runner, job in reversed([*zip(runners, jobs, strict=True)])
                ][::-1]
                warmed += [warm_up(runner, warmup, clock) for runner in dict.fromkeys((*runners, *twins))]
                times = sample((runners, twins), repeats, clock)
            found = [
                filled(runner.row, times[i], None if i == 0 else times[0], seed)
                for i, runner in enumerate(runners)
            ]
            rows += [placed(row, batch_size_of(fitted), used) for row in found]
            warned += _warnings(found, times)
    isa = torch.backends.cpu.get_cpu_capability()
    runtime = (
        None if all(isinstance(entry, nn.Module) for entry in models.values()) else _runtime().__version__
    )
    sizes, used_counts = ([getattr(row, name) for row in rows] for name in ("batch_size", "threads"))
    numbers = _one(sizes), _one(used_counts), repeats, max(warmed)
    said = tuple(dict.fromkeys(warned))
    return Table(tuple(rows), *numbers, cpu_name(), isa, torch.__version__, runtime, clock, said)


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def _one(values: Sequence[int]) -> int | tuple[int, ...]:
    known = tuple(dict.fromkeys(values))
    return known[0] if len(known) == 1 else known


def _check_numbers(models: Any, **numbers: Any) -> None:
    if not isinstance(models, Mapping) or not models:
        raise BenchError(
            "no entries to measure", fix="pass a dict of name -> module or ONNX path, the reference first"
        )
    for name, least in (("threads", 1), ("batch_size", 1), ("repeats", 1), ("warmup", 0)):
        given = numbers[name]
        if (name == "warmup" and given == "stable") or (given is None and name in ("threads", "batch_size")):
            continue
        listed = (
            name in ("threads", "batch_size") and isinstance(given, Sequence) and not isinstance(given, str)
        )
        for value in given if listed else [given]:
            most = _MOST_THREADS if name == "threads" else _MOST
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise BenchError(f"{name} is {value!r}", fix=f"pass a whole number from {least} to {most}")
        if listed and not given:
            raise BenchError(f"{name} is empty", fix="pass a number, or a list of some")


def _jobs(models: Mapping[str, Any], backends: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """(name, module or file, backend) of every row."""
    known = (*MODULE_BACKENDS, *FILE_BACKENDS)
    wrong = (
        [backend for backend in backends if backend not in known]
        if not isinstance(backends, str)
        else [backends]
    )
    if wrong:
        raise BenchError(f"unknown backend {wrong[0]!r}", fix=f"pass a list of some of {', '.join(known)}")
    for name, entry in models.items():
        if not isinstance(entry, nn.Module | str | os.PathLike):
            fix = "pass a torch.nn.Module or the path of an ONNX file"
            raise BenchError(f"entry '{name}' is a {type(entry).__name__}", fix=fix)
        module = isinstance(entry, nn.Module)
        fitting = [
            backend for backend in backends if backend in (MODULE_BACKENDS if module else FILE_BACKENDS)
        ]
        if not fitting:
            kinds = MODULE_BACKENDS if module else FILE_BACKENDS
            raise BenchError(
                f"no backend for entry '{name}'", fix=f"add one of {', '.join(kinds)} to backends"
            )
        for file_name, file in (
            [(name, entry)] if isinstance(entry, nn.Module) else files_in(name, Path(entry))
        ):
            for backend in fitting:
                yield file_name if len(fitting) == 1 else f"{file_name} [{backend}]", file, backend


def _inputs(models: Mapping[str, Any], example_inputs: Any) -> Inputs:
    first = next((entry for entry in models.values() if isinstance(entry, nn.Module)), None)
    if example_inputs is None and first is None:
        raise BenchError("no example inputs, and no module to find them from", fix="pass example_inputs=...")
    try:
        return normalize(
            find_inputs(first)[0] if example_inputs is None and first is not None else example_inputs
        )
    except SurgeonError as error:
        raise BenchError(error.what, where=error.where, why=error.why, fix=error.fix) from error


@contextlib.contextmanager
def _conditions(models: Mapping[str, Any], threads: int | None) -> Iterator[int]:
    """Threads set, modules in eval mode, no gradients, no garbage collection; all put back. Yields the number
    of threads.
    """
    modules = [
        module for entry in models.values() if isinstance(entry, nn.Module) for module in entry.modules()
    ]
    flags = [(module, module.training) for module in modules]
    before, collects = torch.get_num_threads(), gc.isenabled()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        for module in modules:
            module.training = False
        gc.collect()
        gc.disable()
        with torch.inference_mode():
            yield torch.get_num_threads()
    finally:
        if collects:
            gc.enable()
        for module, flag in flags:
            module.training = flag
        torch.set_num_threads(before)


def _warnings(rows: Sequence[Row], times: np.ndarray[Any, Any]) -> Iterator[str]:
    """A machine whose times spread, and ops that did not run where they were asked to."""
    quartiles = np.percentile(times, (25, 50, 75), axis=1)
    spread = float(np.median((quartiles[2] - quartiles[0]) / np.maximum(quartiles[1], 1e-12)))
    if times.shape[1] >= INTERVAL_ROUNDS and spread > _NOISY:
        yield (
            f"the machine is noisy: half of the times of an entry spread over {spread:.0%} of its median; "
            "measure again, or with more repeats"
        )
    for row in rows:
        asked = row.provider.split(", ")[0]
        elsewhere = {provider: count for provider, count in row.nodes.items() if provider != asked}
        if elsewhere:
            fell = ", ".join(f"{count} on {provider}" for provider, count in elsewhere.items())
            yield f"'{row.name}' asked for {asked}, but {fell} of {sum(row.nodes.values())} ops"


def _runtime() -> Any:
    import onnxruntime

    return onnxruntime


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
