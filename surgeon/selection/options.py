"""Request: what the user asked for, checked; shares, numbers and texts with units ("1.2G", "8ms", "3MB",
"50%") become limits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch

from surgeon.errors import InputError

SCOPES = ("uniform", "global", "isomorphic", "knapsack")
HEADS = {
    "both": (),
    "whole": ("head dims",),
    "dims": ("heads",),
    "keep": ("heads", "head dims"),
}  # what may not leave
BUDGETS = ("macs", "params", "size", "memory", "latency")
TARGETS = {
    "cpu": 0,
    "cuda": 8,
    "npu": 32,
}  # block of channels that kernels like; of the CPU it depends on the instruction set

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
UNITS: Mapping[str, Mapping[str, float]] = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "size": _BYTES,
    "memory": _BYTES,
    "latency": _TIMES,
}
Ratio = float | Mapping[str, float]
Budget = float | str


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: a ratio, or one or more budgets, all of which hold.

    Attributes:
        ratio: share of channels to remove from every group, in [0, 1); or {name pattern: ratio}, of which the
            last that matches a group counts, and groups that none matches stay.
        macs, params: a share of the original (up to 1, or "50%") or a number (above 1, or "1.2G").
        size: bytes of the parameters and buffers: a share or a text such as "3MB" (10^6) or "3MiB" (2^20).
        memory: bytes of the activations that are alive at once, at most: as size.
        latency: a share, or a text such as "8ms".
        scope: "uniform" (the same share of every group), "global" (the lowest scores of all groups),
            "isomorphic" (the lowest scores among groups of like structure) or "knapsack" (what is worth least
            for what it costs; needs a budget). None: knapsack for budgets, uniform for a ratio.
        round_to: kept widths are multiples of this where a group is wide enough: a number, "auto", or a
            target of `TARGETS`.
        heads: what attention may lose: "both" (whole heads or dims within heads, whichever meets the ratio
            more closely), "whole", "dims", or "keep" for nothing.
        max_ratio: the largest share that any group may lose, or {name pattern: share}.
        min_channels: how many channels every group keeps at least, if it has that many.
    """

    ratio: Ratio | None = None
    macs: Budget | None = None
    params: Budget | None = None
    size: Budget | None = None
    memory: Budget | None = None
    latency: Budget | None = None
    scope: str | None = None
    round_to: int | str = "auto"
    heads: str = "both"
    max_ratio: Ratio = 1.0
    min_channels: int = 1

    def __post_init__(self) -> None:
        asked = [name for name in BUDGETS if getattr(self, name) is not None]
        if (self.ratio is None) == (not asked):
            raise InputError(
                f"got a ratio and {' and '.join(asked)} together"
                if asked
                else "got neither a ratio nor a budget",
                fix=f"pass ratio=..., or one or more of {', '.join(BUDGETS)}",
            )
        for name in ("ratio", "max_ratio"):
            value = getattr(self, name)
            for pattern, share in value.items() if isinstance(value, Mapping) else [("", value)]:
                if share is not None:
                    _check_share(
                        f"{name} of '{pattern}'" if pattern else name, share, closed=name == "max_ratio"
                    )
        for name in asked:
            parse(name, getattr(self, name))
        if self.scope is None:
            object.__setattr__(self, "scope", "knapsack" if asked else "uniform")
        if self.scope == "knapsack" and not asked:
            raise InputError(
                "scope 'knapsack' weighs what leaves against a budget, and there is none",
                fix="pass macs=0.5, say",
            )
        for name, known in (("scope", SCOPES), ("heads", tuple(HEADS))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}", fix=f"use one of {', '.join(known)}"
                )
        if isinstance(self.round_to, str):
            if self.round_to != "auto" and self.round_to not in TARGETS:
                raise InputError(
                    f"unknown round_to {self.round_to!r}", fix=f"use a number, auto, {', '.join(TARGETS)}"
                )
        elif not _whole(self.round_to):
            raise InputError(
                f"round_to must be a positive whole number, auto or a target, got {self.round_to!r}"
            )
        if not _whole(self.min_channels):
            raise InputError(f"min_channels must be a positive whole number, got {self.min_channels!r}")

    @property
    def budgets(self) -> dict[str, Budget]:
        return {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}

    def block(self, device: str) -> int:
        """What kept widths are multiples of, for weights on this type of device.

        "auto" is 16 on CPUs with AVX-512 and 8 on others (the blocks of ONNX Runtime's and oneDNN's
        convolutions), 8 on GPUs (tensor cores), and 16 where nothing is known (the meta device).
        """
        if not isinstance(self.round_to, str):
            return self.round_to
        target = device if self.round_to == "auto" else self.round_to
        if target == "cpu":
            return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
        return TARGETS.get(target, 16)

    def limit(self, kind: str, full: float) -> float:
        """The budget of this kind in its own unit; `full` is what the original costs."""
        amount, shared = parse(kind, getattr(self, kind))
        return amount * full if shared else amount


class PlanOptions(TypedDict, total=False):
    """The keyword arguments of `Surgery.plan`, which `shrink` passes on."""

    macs: Budget | None
    params: Budget | None
    size: Budget | None
    memory: Budget | None
    latency: Budget | None
    runtime: str
    threads: int
    criterion: Any
    data: Any
    loss: Any
    scope: str | None
    round_to: int | str
    heads: str
    max_ratio: Ratio
    min_channels: int
    ignore: Any
    ignore_inputs: Any
    config_expressible: bool
    seed: int


def of_pattern(value: Ratio, names: Iterable[str], default: float) -> float:
    """The number for something that has these names: the last pattern that matches one of them."""
    if not isinstance(value, Mapping):
        return value
    found, names = default, list(names)
    for pattern, number in value.items():
        if any(matches(pattern, name) for name in names):
            found = number
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern with * and ? names this module or tensor, or one that holds it."""
    regex = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(rf"{regex}(\..*)?", name) is not None


def parse(kind: str, value: Any) -> tuple[float, bool]:
    """(amount, whether it is a share of the original) of a budget; bytes for size and memory, milliseconds
    for latency.

    Raises:
        InputError: it is no number, not positive, or has no unit that fits.
    """
    units = UNITS[kind]
    examples = {"macs": "0.5 or '1.2G'", "params": "0.5 or '3M'", "latency": "0.5 or '8ms'"}.get(
        kind, "0.5 or '3MB'"
    )
    fix = f"pass a share or an amount with its unit, such as {kind}={examples}"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z%]*)\s*", value)
        unit = match[2].lower() if match else ""
        if match is None or match[1].count(".") > 1 or unit not in ("%", "", *units):
            raise InputError(
                f"cannot read {kind}={value!r}",
                why=f"known units: %, {', '.join(u for u in units if u)}",
                fix=fix,
            )
        if not unit:
            return parse(kind, float(match[1]))
        amount = float(match[1])
        amount, shared = (amount / 100, True) if unit == "%" else (amount * units[unit], False)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{kind} must be a finite number or a text with a unit, got {value!r}", fix=fix)
    else:
        amount, shared = float(value), value <= 1
        if not shared and "" not in units:
            raise InputError(f"{kind}={value!r} has no unit", fix=fix)
    if amount <= 0:
        raise InputError(f"{kind} budget {value!r} must be positive", fix=fix)
    return amount, shared


def _check_share(name: str, value: Any, closed: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    if not 0 <= value < 1 and not (closed and value == 1):
        raise InputError(
            f"{name} {value} is outside [0, 1{']' if closed else ')'}",
            why="it is the share of channels to remove: 0 removes nothing, 0.5 every second channel",
            fix="pass a ratio such as 0.5",
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
