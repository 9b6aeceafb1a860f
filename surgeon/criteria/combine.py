"""What a criterion makes of the several slots or consumers that speak for one group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
from torch import Tensor

from surgeon.coupling.groups import Group, Member
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds

Criterion: TypeAlias = Callable[[Group, Mapping[str, Tensor]], Any]

COMBINE: Mapping[str, Callable[[DimIds], DimIds]] = {
    "mean": lambda parts: np.nanmean(parts, axis=0),
    "sum": lambda parts: np.nansum(parts, axis=0),
    "max": lambda parts: np.nanmax(parts, axis=0),
    "first": lambda parts: np.take_along_axis(parts, np.isfinite(parts).argmax(axis=0)[None], axis=0)[0],
}
NORMALIZE: Mapping[str | None, Callable[[DimIds], float]] = {
    "mean": lambda part: float(np.nanmean(part)),
    "max": lambda part: float(np.nanmax(part)),
    "sum": lambda part: float(np.nansum(part)),
    None: lambda part: 1.0,
}


class Combined:
    """Base of criteria with one part for each slot or consumer of a group.

    A part s is one score per unit. `normalize` divides it by its own mean, its maximum or its sum over the
    units of the group, so that large and small layers count alike (None: leaves it). `combine` makes one
    score of all parts: their mean, sum or maximum, or the first of them in the order in which the model holds
    (or reads) them. A part that says nothing of a unit has NaN there and does not count for it.
    """

    def __init__(self, combine: str = "mean", normalize: str | None = "mean") -> None:
        for name, value, known in (
            ("combine", combine, list(COMBINE)),
            ("normalize", normalize, list(NORMALIZE)),
        ):
            if value not in known:
                raise InputError(
                    f"unknown {name}={value!r}",
                    where=type(self).__name__,
                    fix=f"use one of {', '.join(map(repr, known))}",
                )
        self.combine, self.normalize = combine, normalize

    def fresh(self) -> Self:
        """A copy that remembers nothing of a model."""
        return copy.copy(self)

    def combined(self, parts: Sequence[DimIds], units: int) -> DimIds:
        """Scores of the slots of a group, normalised each and combined: one per unit."""
        if not parts:
            return np.zeros(units)
        scale = NORMALIZE[self.normalize]
        return COMBINE[self.combine](np.stack([part / max(scale(part), 1e-30) for part in parts]))


def by_unit(member: Member, values: DimIds, units: int) -> DimIds:
    """Values per index of a slot, summed by the unit that each leaves with."""
    found: DimIds = np.bincount(member.unit, weights=values[member.index], minlength=units)
    return found


def array(tensor: Tensor) -> DimIds:
    """A tensor as a float64 array on the CPU, without its gradient."""
    found: DimIds = tensor.detach().double().cpu().numpy()
    return found


def weights(group: Group, tensors: Mapping[str, Tensor]) -> list[Member]:
    """The group's slots of float tensors with two or more dims; of vectors where it has none."""
    floats = [m for m in group.members if tensors[m.tensor].is_floating_point()]
    return [m for m in floats if tensors[m.tensor].dim() >= 2] or floats
