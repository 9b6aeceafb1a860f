"""Runners -> interleaved samples, and intervals of their quotients."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surgeon.onnx.compare import Inputs
from surgeon.timing.backends import open_entry
from surgeon.timing.file_backends import Runner
from surgeon.timing.table import Row

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLES = {50: 1, 90: 64, 99: 662}  # percentile -> fewest samples with which it is shown
INTERVAL_ROUNDS = 6  # below this not even a sign test can exclude 1 at 95 %: 2 * 0.5 ** 5 > 0.05
_RESAMPLES = 1000
_WINDOW, _STABLE, _MOST_WARMUP, _MOST_SECONDS = (
    5,
    0.02,
    50,
    5.0,
)  # of a warm-up: runs, difference of medians, limits


def warm_up(runner: Runner, warmup: int | str, clock: str) -> int:
    """Untimed runs; how many there were."""
    if isinstance(warmup, int):
        for _ in range(warmup):
            runner.run()
        return warmup
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _MOST_WARMUP and time.perf_counter() - started < _MOST_SECONDS:
        times.append(runner.timed(CLOCKS[clock]))
        if len(times) >= 2 * _WINDOW:
            late, early = np.median(times[-_WINDOW:]), np.median(times[-2 * _WINDOW : -_WINDOW])
            if abs(late - early) <= _STABLE * early:
                break
    return len(times)


def twin(runner: Runner, job: tuple[str, Any, str], inputs: Inputs, threads: int) -> Runner:
    """Another session of a file; a module is what it is."""
    return runner if runner.fed is None else open_entry(*job, inputs, threads, details=False)


def sample(twins: tuple[Sequence[Runner], Sequence[Runner]], rounds: int, clock: str) -> np.ndarray[Any, Any]:
    """Seconds of shape (entries, rounds); two rounds with the first session of each, two with the second, and
    so on.
    """
    count = len(twins[0])
    times = np.zeros((count, rounds))
    for turn in range(rounds):
        for index in range(count) if turn % 2 == 0 else reversed(range(count)):
            times[index, turn] = twins[turn // 2 % 2][index].timed(CLOCKS[clock])
    return times


def filled(row: Row, times: np.ndarray[Any, Any], reference: np.ndarray[Any, Any] | None, seed: int) -> Row:
    """The row with percentiles of `times` (seconds) and, if there is a reference, the paired ratio."""
    count = len(times)
    ratio = low = high = None
    if reference is not None:
        ratios = reference / np.maximum(times, 1e-12)
        ratio = float(np.median(ratios))
        if count >= INTERVAL_ROUNDS:
            low, high = _interval(ratios, seed)
    shown: dict[str, Any] = {
        f"p{q}": float(np.percentile(times, q)) * 1e3 for q, least in SAMPLES.items() if count >= least
    }
    gain = low is not None and low > 1.0
    return dataclasses.replace(row, samples=count, ratio=ratio, low=low, high=high, gain=gain, **shown)


def _interval(ratios: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median: the wider of one over rounds and one over blocks of neighbouring
    rounds.

    What disturbs one round often lasts for the next ones (Politis and Romano 1992), which single rounds do
    not show.
    """
    count = len(ratios)
    generator = np.random.default_rng(seed)
    ends = []
    for length in (1, math.ceil(count ** (1 / 3))):
        starts = generator.integers(0, count, (_RESAMPLES, -(-count // length)))
        picks = ((starts[:, :, None] + np.arange(length)) % count).reshape(_RESAMPLES, -1)[:, :count]
        ends.append(np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5)))
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def placed(row: Row, batch_size: int, threads: int) -> Row:
    rate = 1e3 * batch_size / row.p50 if batch_size and row.p50 > 0 else None
    return dataclasses.replace(row, batch_size=batch_size, threads=threads, throughput=rate)
