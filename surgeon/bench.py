"""bench({name: module or ONNX file}) -> a Table of CPU latencies, measured in turns, with ratios to the first entry.

Every round runs every entry once, forwards then backwards (A B C, C B A, ...), so that drift of the machine hits all alike. A
ratio is the median over rounds of reference time / entry time, with a bootstrap 95 % interval; it is a gain only if the whole
interval is above 1. High percentiles are withheld until there are enough samples to estimate them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import table as rich_table
from rich.console import Console
from rich.text import Text
from torch import nn

from surgeon.agree import Inputs, batch_size_of, feeds, with_batch
from surgeon.errors import BenchError, SurgeonError
from surgeon.inputs import find_inputs, normalize

_SAMPLES = {50: 1, 90: 64, 99: 662}  # percentile -> fewest samples with which it is shown
_INTERVAL_ROUNDS = 6  # below this not even a sign test can exclude 1 at 95 %: 2 * 0.5 ** 5 > 0.05
_RESAMPLES = 1000
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry: times in milliseconds, None where withheld or not defined.

    Attributes:
        name: the caller's name.
        provider: what really ran it: "torch eager", or the session's ONNX Runtime execution providers.
        params: number of parameters; None for files.
        size_bytes: parameters and buffers in memory, or the file on disk (external weights included).
        samples: number of timed runs.
        p50, p90, p99: percentiles of one run, ms; p90 needs 64 samples, p99 662.
        ratio: median over rounds of reference time / this time (2.0: twice as fast); None for the reference.
        low, high: bootstrap 95 % interval of the ratio; None for the reference and below 6 rounds.
        gain: whether the whole interval is above 1.
    """

    name: str
    provider: str
    params: int | None
    size_bytes: int
    samples: int = 0
    p50: float = math.nan
    p90: float | None = None
    p99: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    gain: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows (the first is the reference) and what they were measured with."""

    rows: tuple[Row, ...]
    batch_size: int
    threads: int
    rounds: int
    warmup: int
    cpu: str
    isa: str
    torch: str
    onnxruntime: str | None
    clock: str = "wall"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in ms."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """A GitHub table, with the conditions below it."""
        rows = [_HEADER, ["---", "---", *["---:"] * (len(_HEADER) - 2)], *map(_cells, self.rows)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", self._conditions()])

    def rich(self) -> rich_table.Table:
        """The same table for a rich console."""
        table = rich_table.Table(caption=Text(self._conditions()), caption_justify="left")
        for index, title in enumerate(_HEADER):
            table.add_column(title, justify="left" if index < 2 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)), style="green" if row.gain else None)
        return table

    def __str__(self) -> str:
        sink = io.StringIO()
        Console(file=sink, width=130, color_system=None, force_terminal=False).print(self.rich())
        return sink.getvalue().rstrip()

    def _conditions(self) -> str:
        runtime = f", onnxruntime {self.onnxruntime}" if self.onnxruntime else ""
        return (
            f"{self.cpu} ({self.isa}), {self.threads} thread{'s' * (self.threads != 1)}, batch {self.batch_size}, "
            f"{self.rounds} interleaved rounds after {self.warmup} warm-up runs, {self.clock} clock, torch {self.torch}"
            f"{runtime}. "
            "Ratio: reference time / time, median of rounds [bootstrap 95 % interval]; '-': too few samples."
        )


_HEADER = ["model", "ran on", "p50 ms", "p90 ms", "p99 ms", "speed-up", "gain", "params", "bytes"]


def bench(
    models: Mapping[str, nn.Module | str | os.PathLike[str]], example_inputs: Any = None, *,
    threads: int | None = None, batch_size: int | None = None, repeats: int = 30, warmup: int = 5, clock: str = "wall",
    seed: int = 0,
) -> Table:  # fmt: skip
    """Measure the CPU latency of modules (eager, eval, inference mode) and ONNX files (ONNX Runtime) against the first entry.

    Args:
        models: name -> a torch module on the CPU, or the path of an ONNX file. The first one is the reference.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords), for all entries. None: found from the first module.
        threads: intra-op threads for both runtimes. None: torch's current number, which is restored in any case.
        batch_size: repeat or cut the inputs along dim 0 to this many rows.
        repeats: number of rounds; each times every entry once.
        warmup: untimed runs of each entry before the rounds, after one untimed run that checks it.
        clock: "wall", or "cpu" for the time that this process spends on processors: on a busy machine it says for one thread what
            the wall clock would say on a quiet one.
        seed: of the bootstrap.

    Returns:
        A `Table`, one row for each entry in the given order.

    Raises:
        BenchError: an entry or number is bad, a file is missing or damaged, or an entry does not run on the inputs.
    """
    if clock not in _CLOCKS:
        raise BenchError(f"unknown clock {clock!r}", fix=f"use one of {', '.join(_CLOCKS)}")
    _check_numbers(models, threads=threads, batch_size=batch_size, repeats=repeats, warmup=warmup)
    inputs = _inputs(models, example_inputs)
    if batch_size is not None:
        inputs = with_batch(inputs, batch_size)
    with _conditions(models, threads) as count:
        entries = [_open(name, entry, inputs, count) for name, entry in models.items()]
        for _, run in entries:
            _measure([run], warmup, clock)
        times = _measure([run for _, run in entries], repeats, clock)
    rows = [_filled(row, times[i], None if i == 0 else times[0], seed) for i, (row, _) in enumerate(entries)]
    numbers, isa = (batch_size_of(inputs), count, repeats, warmup), torch.backends.cpu.get_cpu_capability()
    runtime = None if all(isinstance(entry, nn.Module) for entry in models.values()) else _runtime().__version__
    return Table(tuple(rows), *numbers, cpu_name(), isa, torch.__version__, runtime, clock)


_Entry = tuple[Row, Callable[[], Any]]  # what is known before any timing, and one run


def _check_numbers(models: Any, **numbers: Any) -> None:
    if not isinstance(models, Mapping) or not models:
        raise BenchError("no entries to measure", fix="pass a dict of name -> module or ONNX path, the reference first")
    for name, least in (("threads", 1), ("batch_size", 1), ("repeats", 1), ("warmup", 0)):
        value = numbers[name]
        absent = value is None and name in ("threads", "batch_size")
        if not absent and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise BenchError(f"{name} is {value!r}", fix=f"pass a whole number of at least {least}")


def _inputs(models: Mapping[str, Any], example_inputs: Any) -> Inputs:
    first = next((entry for entry in models.values() if isinstance(entry, nn.Module)), None)
    if example_inputs is None and first is None:
        raise BenchError("no example inputs, and no module to find them from", fix="pass example_inputs=...")
    try:
        return normalize(find_inputs(first)[0] if example_inputs is None and first is not None else example_inputs)
    except SurgeonError as error:
        raise BenchError(error.what, where=error.where, why=error.why, fix=error.fix) from error


@contextlib.contextmanager
def _conditions(models: Mapping[str, Any], threads: int | None) -> Iterator[int]:
    """Threads set, modules in eval mode, no gradients, no garbage collection; all put back. Yields the number of threads."""
    modules = [module for entry in models.values() if isinstance(entry, nn.Module) for module in entry.modules()]
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


def _open(name: str, entry: Any, inputs: Inputs, threads: int) -> _Entry:
    """An entry that has run once."""
    if isinstance(entry, nn.Module):
        opened = _module(name, entry, inputs)
    elif isinstance(entry, str | os.PathLike):
        opened = _file(name, Path(entry), inputs, threads)
    else:
        raise BenchError(f"entry '{name}' is a {type(entry).__name__}", fix="pass a torch.nn.Module or the path of an ONNX file")
    try:
        opened[1]()
    except Exception as error:  # the model's own code or ONNX Runtime's own classes: all of it is reported
        fix = "pass example_inputs that fit every entry; a file of fixed batch needs that batch"
        raise BenchError(f"entry '{name}' does not run on the inputs", why=_reason(error), fix=fix) from error
    return opened


def _module(name: str, module: nn.Module, inputs: Inputs) -> _Entry:
    args, kwargs = inputs
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise BenchError(f"entry '{name}' is on {tensor.device}", why="only CPU latency is measured", fix="call model.cpu()")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    params = sum(parameter.numel() for parameter in module.parameters())
    return Row(name, "torch eager", params, size), lambda: module(*args, **kwargs)


def _file(name: str, path: Path, inputs: Inputs, threads: int) -> _Entry:
    if not path.is_file():
        raise BenchError(f"entry '{name}': there is no such file", where=str(path), fix="export the model first")
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads must not slow the next entry
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        what, fix = f"entry '{name}' is not an ONNX file that ONNX Runtime can load", "write it anew with surgeon.export(...)"
        raise BenchError(what, where=str(path), why=_reason(error), fix=fix) from error
    try:
        fed = feeds(inputs, session.get_inputs())
    except (SurgeonError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        fix = "pass example_inputs with one tensor for each input of the file, of its dtype"
        raise BenchError(f"entry '{name}' cannot be fed", where=str(path), why=str(error), fix=fix) from error
    external = path.with_name(path.name + ".data")
    size = path.stat().st_size + (external.stat().st_size if external.is_file() else 0)
    return Row(name, ", ".join(session.get_providers()), None, size), lambda: session.run(None, fed)


def _measure(runs: Sequence[Callable[[], Any]], rounds: int, clock: str = "wall") -> np.ndarray[Any, Any]:
    """Seconds of shape (entries, rounds)."""
    times = np.zeros((len(runs), rounds))
    now = _CLOCKS[clock]
    for turn in range(rounds):
        for index in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            start = now()
            runs[index]()
            times[index, turn] = now() - start
    return times


def _filled(row: Row, times: np.ndarray[Any, Any], reference: np.ndarray[Any, Any] | None, seed: int) -> Row:
    """The row with percentiles of `times` (seconds) and, if there is a reference, the paired ratio."""
    count = len(times)
    ratio = low = high = None
    if reference is not None:
        ratios = reference / np.maximum(times, 1e-12)
        ratio = float(np.median(ratios))
        if count >= _INTERVAL_ROUNDS:
            picks = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
            low, high = (float(x) for x in np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5)))
    shown: dict[str, Any] = {f"p{q}": float(np.percentile(times, q)) * 1e3 for q, least in _SAMPLES.items() if count >= least}
    gain = low is not None and low > 1.0
    return dataclasses.replace(row, samples=count, ratio=ratio, low=low, high=high, gain=gain, **shown)


def _cells(row: Row) -> list[str]:
    times = ["-" if value is None else f"{value:.3f}" for value in (row.p50, row.p90, row.p99)]
    interval = " [-]" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
    ratio = "reference" if row.ratio is None else f"{row.ratio:.2f}x{interval}"
    gain = "" if row.ratio is None else "yes" if row.gain else "no"
    return [row.name, row.provider, *times, ratio, gain, "-" if row.params is None else f"{row.params:,}", f"{row.size_bytes:,}"]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:400]}"


def _runtime() -> Any:
    import onnxruntime

    return onnxruntime


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
