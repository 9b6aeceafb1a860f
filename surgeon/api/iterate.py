"""iterate(model, ...) -> steps: prune a little, let the caller train, prune on; stop at an accuracy floor.

A schedule says which share of all that is to leave has left after which share of the steps.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Unpack

from torch import nn

from surgeon.api.pipeline import inspect, prove
from surgeon.api.surgery import Surgery
from surgeon.cut.plan import Plan
from surgeon.errors import BudgetError, InputError, NothingRemovedWarning
from surgeon.selection.amounts import parse
from surgeon.selection.options import BUDGETS, PlanOptions, takes_options
from surgeon.selection.request import refuse_as_ratio

Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "exponential": lambda t: (1 - math.exp(-5 * t)) / (1 - math.exp(-5)),
    "sinusoidal": lambda t: (1 - math.cos(math.pi * t)) / 2,
}
"""Share that has left by progress t in (0, 1]: all at the first step; evenly; 1 - (1 - t)^3 (Zhu and Gupta, To prune, or not to
prune, 2017); (1 - e^-5t) / (1 - e^-5); (1 - cos(pi t)) / 2."""


@dataclasses.dataclass
class Step:
    """One step of `iterate`.

    Attributes:
        number: 1, 2, ...; `steps` of them.
        model: the smaller model, to be trained by the caller, who may also put another module of its shapes
            in its place.
        plan: what left in this step.
        share: of all that is to leave, what has left by now.
        score: of the model after the caller's training, once the next step is asked for; None without a
            score.
    """

    number: int
    steps: int
    model: nn.Module
    plan: Plan
    share: float
    score: float | None = None


class Iteration:
    """Steps of pruning, to be looped over once; see `iterate`.

    `plan` says in one what left of the original.

    Attributes:
        model: the last model that met the floor (without a floor, of the last step); the original before the
            first step.
        steps: what was done, in order.
        stopped: why it ended before the last step, "" if it did not.
    """

    def __init__(
        self, model: nn.Module, ratio: float | None, steps: int, schedule: Schedule, inputs: Any, outputs: Any, verify: bool,
        score: Callable[[nn.Module], float] | None, floor: float | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.stopped = model, ""
        self.steps: list[Step] = []
        self._ratio, self._count, self._schedule, self._verify = ratio, steps, schedule, verify
        self._inputs, self._outputs, self._options = inputs, outputs, options
        self._score, self._floor = score, floor
        self._first: Surgery | None = None  # of the original
        self._taken = 0  # steps that `model` has behind it

    @property
    def plan(self) -> Plan | None:
        """What left on the way from the original to `model`, in one plan (see `Surgery.compose`); None if
        nothing did.

        Raises:
            PlanError: what left cannot leave the original in one go.
        """
        if self._first is None or not self._taken:
            return None
        return self._first.compose([step.plan for step in self.steps[: self._taken]])

    def __iter__(self) -> Iterator[Step]:
        if self.steps:
            raise InputError("these steps were already taken", fix="call surgeon.iterate(...) again")
        current = self.model
        first = self._first = inspect(current, self._inputs, outputs=self._outputs)
        widths = {group.name: group.width for group in first.groups}
        full = {kind: getattr(first, kind) for kind in self._options if kind in BUDGETS}
        surgery = first
        for number in range(1, self._count + 1):
            share = float(self._schedule(number / self._count))
            if not 0 <= share <= 1 + 1e-9:
                raise InputError(
                    f"the schedule gave {share} at {number / self._count:.3g}", fix="return a share in [0, 1]"
                )
            try:
                with warnings.catch_warnings():  # of a few channels, the first steps may take none
                    warnings.simplefilter("ignore", NothingRemovedWarning)
                    small, plan = surgery.cut(**self._asked(surgery, widths, full, min(share, 1.0)))
            except BudgetError as error:
                self.stopped = error.what
                return
            if self._verify:
                prove(current, small, plan, surgery)
            step = Step(number, self._count, small, plan, share)
            self.steps.append(step)
            yield step
            current = step.model
            if self._score is not None:
                step.score = float(self._score(current))
                if not math.isfinite(step.score) or (self._floor is not None and step.score < self._floor):
                    self.stopped = f"step {number} has score {step.score:.6g}, below the floor {self._floor}"
                    return
            self.model, self._taken = current, number
            if number < self._count:
                surgery = inspect(current, self._inputs, outputs=self._outputs)

    def _asked(
        self, surgery: Surgery, widths: dict[str, int], full: dict[str, float], share: float
    ) -> dict[str, Any]:
        """The arguments of the plan that brings a model, cut before perhaps, to this share of the way."""
        asked = dict(self._options)
        for kind, whole in full.items():
            amount, shared = parse(kind, asked[kind])
            target = amount if shared else amount / whole
            asked[kind] = f"{100 * whole * (1 - (1 - target) * share) / getattr(surgery, kind):.12g}%"
        if self._ratio is None:
            return asked
        if asked.get("scope", "uniform") in (
            None,
            "uniform",
        ):  # each group by what it once had, so that roundings do not add up
            ratios: dict[str, float] = {}
            for group in surgery.groups_without(asked.get("ignore", ()), asked.get("ignore_inputs", ())):
                wanted = widths.get(group.name, group.width) * (1 - self._ratio * share)
                ratios |= dict.fromkeys(group.producers, max(0.0, 1 - wanted / group.width))
            return {**asked, "ratio": ratios}
        done = self.steps[-1].share if self.steps else 0.0
        return {**asked, "ratio": 1 - (1 - self._ratio * share) / (1 - self._ratio * done)}


@takes_options
def iterate(
    model: nn.Module,
    ratio: float | None = None,
    *,
    steps: int = 10,
    schedule: str | Schedule = "cubic",
    example_inputs: Any = None,
    outputs: Any = None,
    score: Callable[[nn.Module], float] | None = None,
    floor: float | None = None,
    verify: bool = True,
    **options: Unpack[PlanOptions],
) -> Iteration:
    """Prune in steps, with the caller's training in between.

        run = surgeon.iterate(model, 0.7, steps=10, schedule="cubic", score=accuracy, floor=0.90)
        for step in run:
            train(step.model)
        small = run.model  # the last one that met the floor

    Args:
        ratio: share of the channels of every group that is to leave in all; or budgets among the options
            (macs=0.3, ...), which are shares of the original.
        steps: how many.
        schedule: a name of `SCHEDULES`, or a callable: progress in (0, 1] -> share of it all that has left by
            then.
        score: of a model, higher is better; asked after the caller's training in each step.
        floor: the loop ends at the first model whose score is lower, and `run.model` is the one before it.
        example_inputs, outputs, verify: see `shrink`. No latency among the options.

    Raises:
        InputError: an argument is bad.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise InputError(
            f"unknown schedule {schedule!r}", fix=f"use one of {', '.join(SCHEDULES)}, or a callable"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a positive whole number, got {steps!r}")
    if floor is not None and score is None:
        raise InputError(
            "a floor needs a score", fix="pass score=..., a callable: model -> number, higher is better"
        )
    if options.get("latency") is not None:
        raise InputError(
            "a latency cannot be reached in steps", fix="prune to macs=... in steps, then plan(latency=...)"
        )
    known: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if (ratio is None) == (not any(name in BUDGETS for name in known)):
        raise InputError(
            "pass either a ratio or budgets", fix="iterate(model, 0.7, ...) or iterate(model, macs=0.3, ...)"
        )
    if ratio is not None:
        refuse_as_ratio(ratio)
    if ratio is not None and not 0 < ratio < 1:
        raise InputError(f"ratio {ratio!r} is outside (0, 1)")
    rule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    return Iteration(model, ratio, steps, rule, example_inputs, outputs, verify, score, floor, known)
