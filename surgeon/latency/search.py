"""Meet a latency: choose by prediction, measure the candidate in turns with the original, correct the
prediction, repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import BudgetError, SurgeonWarning, warn
from surgeon.latency.kernels import Choice
from surgeon.latency.predict import Predictor
from surgeon.onnx.export import export
from surgeon.timing.bench import bench

Candidate = tuple[Choice, int]  # and the block that its widths are multiples of

CLOSE = 0.03  # below a limit: close enough
_CANDIDATES = 8  # measured for one latency
_ROUNDS = 24  # interleaved runs of two whole models


def search(
    chosen: Callable[[], Candidate],
    predict: Predictor,
    measure: Callable[[Choice], tuple[float, float, tuple[float, float]]],
    limit_of: Callable[[float], float],
    close: Callable[[Choice], bool] = lambda choice: False,
) -> tuple[Candidate, dict[str, Any]]:
    """Choose, measure, correct the prediction, and choose again, until what is measured is just below the
    limit.

    Args:
        chosen: a candidate within the budgets, by the prediction as it stands.
        measure: (ms of the original, ms of the small model, 95 % interval of their quotient) of a choice.
        limit_of: the limit in ms, given the original's.
        close: whether another budget is met closely by a choice.

    Returns:
        The candidate that was measured closest below the limit, or the first below it that another budget
        holds back; and its figures.

    Raises:
        BudgetError: every candidate was measured above the limit, down to the smallest one.
    """
    best: tuple[float, Candidate, dict[str, Any]] | None = None
    nearest = math.inf
    for tried in range(1, _CANDIDATES + 1):
        try:
            candidate = chosen()
        except BudgetError:
            if best is not None:
                break
            if tried == 1 or nearest is math.inf:
                raise
            raise BudgetError(
                f"no candidate reaches the latency: {nearest:.3g} times the limit was the nearest that was measured",
                why="parts that must stay take longer than the budget allows",
                fix="ask for more time, or see which layers are frozen: print(surgeon.inspect(model))",
            ) from None
        choice, _ = candidate
        before, after, interval = measure(choice)
        share = after / limit_of(before)
        nearest = min(nearest, share)
        said = {
            "original_ms": before,
            "ms": after,
            "interval": interval,
            "limit_ms": limit_of(before),
            "candidates": tried,
        }
        if share <= 1 and (best is None or share > best[0]):
            best = share, candidate, said
        if 1 - CLOSE <= share <= 1:
            break
        if share <= 1 and close(choice):
            return candidate, said
        aim = 1 - CLOSE / 2  # the middle of what is close enough
        predict.correction *= share / aim / (predict(choice) / limit_of(predict.total))
    if best is None:
        raise BudgetError(
            f"no candidate of {_CANDIDATES} reaches the latency: {nearest:.3g} times the limit was the nearest that was measured",
            why="the machine is too noisy, or what must stay takes too long",
            fix="ask for more time, or try again on a quiet machine",
        )
    if best[0] < 1 - CLOSE:
        warn(
            f"the latency is {best[0]:.1%} of the limit: no candidate was measured closer below it",
            SurgeonWarning,
        )
    return best[1], best[2]


class Stopwatch:
    """Measures whole models in turns with the original, as they would be deployed.

    For ONNX Runtime both are exported (and so fused); for torch both run eagerly as they are.
    """

    def __init__(self, model: nn.Module, inputs: Any, runtime: str, threads: int, folder: str) -> None:
        self.inputs, self.runtime, self.threads, self.folder = inputs, runtime, threads, Path(folder)
        self.original = self._deployed(model, "original")
        self.count = 0

    def _deployed(self, model: nn.Module, name: str) -> nn.Module | Path:
        if self.runtime == "torch":
            return model
        path = self.folder / f"{name}.onnx"
        export(model, path, self.inputs, dynamic_batch=False)
        return path

    def measure(self, small: nn.Module | None = None) -> tuple[float, float, tuple[float, float]]:
        """(milliseconds of the original, of the small model, 95 % interval of small / original), medians of
        interleaved runs.
        """
        self.count += 1
        models: dict[str, Any] = {"original": self.original}
        models["small"] = self.original if small is None else self._deployed(small, f"small-{self.count}")
        clock = (
            "cpu" if self.threads == 1 else "wall"
        )  # with one thread the same, but for what else runs on the machine
        table = bench(models, self.inputs, threads=self.threads, repeats=_ROUNDS, clock=clock)
        before, after = table.rows
        assert after.ratio is not None and after.low is not None and after.high is not None
        return before.p50, before.p50 / after.ratio, (1 / after.high, 1 / after.low)
