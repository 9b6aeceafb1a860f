"""Criteria: a group and the model's tensors -> one score per unit, low scores leave first.

A criterion is any callable `(group, tensors) -> array of group.units scores`. `criterion(name)` finds a built-in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from surgeon.criteria import magnitude
from surgeon.errors import InputError
from surgeon.groups import Group
from surgeon.labels import Track

Criterion = Callable[[Group, Mapping[str, Tensor]], Track]

BUILT_IN: dict[str, Callable[[int], Criterion]] = {
    "l1": lambda seed: magnitude.Norm(1),
    "l2": lambda seed: magnitude.Norm(2),
    "bn_scale": lambda seed: magnitude.BatchNormScale(),
    "random": lambda seed: magnitude.Random(seed),
    "first": lambda seed: magnitude.first,
}


def criterion(which: str | Criterion, seed: int = 0) -> Criterion:
    """A built-in criterion by name, or the callable itself.

    Raises:
        InputError: no criterion has that name; the known ones are listed.
    """
    if callable(which):
        return which
    if which not in BUILT_IN:
        raise InputError(f"unknown criterion {which!r}", fix=f"use one of {', '.join(sorted(BUILT_IN))}, or a callable")
    return BUILT_IN[which](seed)


def scores(which: Criterion, group: Group, tensors: Mapping[str, Tensor]) -> Track:
    """The criterion's scores as a float64 array [lanes, steps], checked.

    Raises:
        InputError: wrong length, or a score that is NaN or infinite.
    """
    found = np.asarray(which(group, tensors), dtype=np.float64)
    if found.shape != (group.units,):
        raise InputError(
            f"the criterion gave scores of shape {found.shape} for a group of {group.units} units",
            where=group.name,
            fix="return one score per unit, as a 1-d array or tensor of length group.units",
        )
    if not np.isfinite(found).all():
        raise InputError(
            "the criterion gave a score that is NaN or infinite",
            where=group.name,
            why="the weights hold NaN or inf, or the criterion divides by zero",
            fix="repair the weights (see torch.isfinite) or the criterion",
        )
    return found.reshape(group.lanes.shape)
