"""Learning rates over time: functions step -> factor of the base rate, for finetune and for torch's LambdaLR.

schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(total_steps, warmup=100))  # schedule.step()
after each step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from surgeon.errors import InputError

Schedule = Callable[[int], float]


def cosine(steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """From 1 down to `final` along half a cosine (Loshchilov and Hutter, SGDR, 2017), after a linear warm-up.

    Args:
        steps: in all, warm-up included. Step 0 is the first one; from step `steps` on the factor is `final`.
        warmup: steps on the way up: (step + 1) / (warmup + 1).
        final: factor at the end, in [0, 1].

    Raises:
        InputError: steps, warmup or final is out of range.
    """
    _check(steps, warmup)
    if not 0 <= final <= 1:
        raise InputError(f"final must be in [0, 1], got {final!r}")
    return _warmed(warmup, lambda t: final + (1 - final) * (1 + math.cos(math.pi * t)) / 2, steps)


def step(steps: int, warmup: int = 0, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> Schedule:
    """Times `factor` at each share `at` of the way after the warm-up.

    Raises:
        InputError: steps, warmup, at or factor is out of range.
    """
    _check(steps, warmup)
    if not all(0 < share < 1 for share in at) or not 0 < factor <= 1:
        raise InputError(f"shares {tuple(at)} must be in (0, 1) and factor {factor!r} in (0, 1]")
    return _warmed(warmup, lambda t: factor ** sum(t >= share for share in at), steps)


def constant(steps: int, warmup: int = 0) -> Schedule:
    """1 all along, after a linear warm-up.

    Raises:
        InputError: steps or warmup is out of range.
    """
    _check(steps, warmup)
    return _warmed(warmup, lambda t: 1.0, steps)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = {
    "cosine": cosine,
    "step": step,
    "constant": constant,
}


def _warmed(warmup: int, rule: Callable[[float], float], steps: int) -> Schedule:
    """`rule` of the share of the way in [0, 1] that lies behind, after the warm-up."""

    def factor(number: int) -> float:
        if number < warmup:
            return (number + 1) / (warmup + 1)
        return rule(min(1.0, (number - warmup) / (steps - warmup)))

    return factor


def _check(steps: int, warmup: int) -> None:
    if steps < 1 or not 0 <= warmup < steps:
        raise InputError(
            f"{warmup} of {steps} steps cannot be warm-up",
            fix="warm up for fewer steps than there are in all",
        )
