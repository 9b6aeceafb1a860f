"""The built-in criteria by name: each file of a family names its own."""

from __future__ import annotations

from collections.abc import Callable

from surgeon.criteria.combine import Criterion

BUILT_IN: dict[str, Callable[[int], Criterion]] = {}


def named(name: str, make: Callable[[int], Criterion]) -> None:
    """Give a criterion its name.

    Args:
        make: a seed -> the criterion.

    Raises:
        ValueError: the name is taken.
    """
    if name in BUILT_IN:
        raise ValueError(f"two criteria are named {name!r}")
    BUILT_IN[name] = make
