"""The base of criteria that look at data: what they need, and the evidence that `prepare` hands them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from surgeon.coupling.groups import Group, Member
from surgeon.criteria.combine import Combined
from surgeon.criteria.data.evidence import Evidence, Reading
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds


class Measured(Combined):
    """A criterion that needs evidence; `needs` says which (see `calibration.NEEDS`)."""

    needs: ClassVar[frozenset[str]] = frozenset()
    name: ClassVar[str] = ""
    additive: ClassVar[bool] = (
        False  # whether scores are in one unit for all groups, so that they add up to what is lost
    )

    def __init__(self, combine: str = "mean", normalize: str | None = "mean") -> None:
        super().__init__(combine, normalize)
        self._evidence: Evidence | None = None

    def informed(self, evidence: Evidence) -> Self:
        """A copy that scores by this evidence."""
        found = self.fresh()
        found._evidence = evidence
        return found

    @property
    def is_informed(self) -> bool:
        """Whether data was read for it."""
        return self._evidence is not None

    @property
    def evidence(self) -> Evidence:
        """What was read of the data.

        Raises:
            InputError: no data was read yet.
        """
        if self._evidence is None:
            raise self.without_data()
        return self._evidence

    def without_data(self) -> InputError:
        """The error of a criterion that is called before any data was read."""
        return InputError(
            f"criterion {self.name!r} looks at data, and there is none",
            fix="pass data=..., an iterable of batches as the model takes them; with loss=..., of pairs (inputs, targets)",
        )


class FromReadings(Measured):
    """Parts are the consumers that read the group's channels."""

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        return self.combined(
            [self._scores(reading, group.units) for reading in self.readings_of(group)], group.units
        )

    def readings_of(self, group: Group) -> list[Reading]:
        """The readings of a group.

        Raises:
            InputError: nothing reads some of its units.
        """
        readings = self.evidence.of(group)
        read = np.zeros(group.units, dtype=bool)
        for reading in readings:
            read[reading.unit] = True
        if not read.all():
            raise InputError(
                f"criterion {self.name!r} finds nothing that reads {(~read).sum()} of these {group.units} units",
                where=group.name,
                why=self.missing,
                fix=f"use a criterion that looks at the weights, such as {self.instead}, or name the layer in ignore=[...]",
            )
        return readings

    def _scores(self, reading: Reading, units: int) -> DimIds:
        """The part, with NaN for units of which the consumer reads nothing."""
        silent = np.bincount(reading.unit, minlength=units) == 0
        return np.where(silent, np.nan, self.part(reading, units))

    missing = "no convolution or matrix product of the recorded run sums over them"
    instead = "'l2' or 'taylor'"

    def part(self, reading: Reading, units: int) -> DimIds:
        """The score of each unit by what one consumer reads of it."""
        raise NotImplementedError


class FromParameters(Measured):
    """Parts are the group's slots of parameters that take gradients."""

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        known = self.evidence.gradients
        members = [m for m in group.members if m.tensor in known]
        if not members:
            raise InputError(
                f"criterion {self.name!r} finds no parameter with a gradient",
                where=group.name,
                why="only buffers or plain tensors hold these channels",
                fix="use a criterion that looks at the weights, such as 'l2', or name the layer in ignore=[...]",
            )
        return self.combined([self.part(m, group.units) for m in members], group.units)

    def part(self, member: Member, units: int) -> DimIds:
        """The score of each unit by what one slot holds of it."""
        raise NotImplementedError
