"""Shares, numbers and texts with units ("1.2G", "8ms", "3MB", "50%") -> amounts; ratios by name pattern -> numbers."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from surgeon.errors import InputError
from surgeon.selection.options import Ratio

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
    elif isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{kind} must be a finite number or a text with a unit, got {value!r}", fix=fix)
    else:
        amount, shared = float(value), value <= 1
        if not shared and "" not in units:
            raise InputError(f"{kind}={value!r} has no unit", fix=fix)
    if amount <= 0:
        raise InputError(f"{kind} budget {value!r} must be positive", fix=fix)
    return amount, shared


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


def check_share(name: str, value: Any, closed: bool) -> None:
    """Refuse what is no share in [0, 1), or in [0, 1] if the range is closed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    if not 0 <= float(value) < 1 and not (closed and value == 1):
        raise InputError(
            f"{name} {value} is outside [0, 1{']' if closed else ')'}",
            why="it is the share of channels to remove: 0 removes nothing, 0.5 every second channel",
            fix="pass a ratio such as 0.5",
        )
