"""The second-order criterion whose scores are what the model's outputs lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surgeon.coupling.groups import Group
from surgeon.criteria.data.curvature import Curvature
from surgeon.criteria.data.evidence import Reading
from surgeon.criteria.data.gather import WIDEST
from surgeon.criteria.measured import FromReadings
from surgeon.criteria.names import named
from surgeon.criteria.second_order import inverted
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds

_ROUNDS = 64  # in which the units of a group leave, at most


class KFAC(FromReadings):
    """How far the model's outputs move if a unit leaves and the weights that stay make up for it.

    What is lost if a unit is its mean instead (zero, where no bias or batch norm makes up for a mean) is
    measured on the samples, to first order: E (sum over positions of (x - mean) g)^2, g being the gradient of
    the outputs times random signs. Of that stays what a refit leaves, by the ratio of two estimates with
    Kronecker factors: as OBS, with H the covariance of the patches that a consumer reads, and each of its
    outputs weighed by how much the model's outputs hang on it, G = sum of g^2. The units of a group leave one
    after the other in this reckoning (of more than 64 some at once), the least first; H^-1 and the weights
    are brought up to date each time, and a unit's score is what its own leaving adds. Scores are squared
    distances of the model's outputs (or, with a loss, of its curvature), so they add up, and those of
    different groups compare. (Martens and Grosse, Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature, 2015; Wang et al., EigenDamage, 2019; van der Ouderaa et al., The LLM Surgeon,
    2024. Without factors: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019.)

    Where only products of data with data read a unit (queries with keys), its score is what zeros in its
    place do to first order.

    Args:
        damping: of H, times its mean diagonal.
        widest: channels of which a covariance is kept, at most.
        stepwise: entries of one group of a consumer up to which units leave in turn; beyond, each is scored
            as if alone.
    """

    name = "kfac"
    needs: ClassVar[frozenset[str]] = frozenset(("curvature",))
    additive = True

    def __init__(self, damping: float = 1e-3, widest: int = WIDEST, stepwise: int = 1200) -> None:
        super().__init__("sum", None)
        if not damping > 0:
            raise InputError(
                f"damping must be positive, got {damping}",
                where="KFAC",
                why="H has no inverse where channels are dead",
            )
        self.damping, self.widest, self.stepwise = damping, widest, stepwise

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        self.readings_of(group)
        found = [self._left(reading, group.units) for reading in self.evidence.of(group)]
        if any(item.entries > self.stepwise for item in found):
            return self.combined([item.scores() for item in found], group.units)
        return _in_turn(found, group.units)

    def _left(self, reading: Reading, units: int) -> _Left:
        curvature = reading.statistics.curvature
        assert curvature is not None
        if curvature.weight is None:
            return _Left(reading, units, curvature)
        inverse = torch.stack([inverted(block, self.damping) for block in curvature.hessian])
        return _Left(reading, units, curvature, inverse.numpy(), curvature.error.numpy())


def _in_turn(found: Sequence[_Left], units: int) -> DimIds:
    scores, gone, most = np.zeros(units), np.zeros(units, dtype=bool), 0.0
    together = -(-units // _ROUNDS)
    while not gone.all():
        now = sum((item.scores() for item in found), start=np.zeros(units))
        now[gone] = np.inf
        leaving = np.argsort(now, kind="stable")[: min(together, units - int(gone.sum()))]
        for unit in leaving:
            most = max(most * (1 + 1e-12), float(now[unit]))  # a later one never ranks before an earlier one
            scores[unit], gone[unit] = most, True
        for item in found:
            item.remove(leaving)
    return scores


class _Left:
    """H^-1 and W G W^T of one consumer, less the entries that have left."""

    def __init__(
        self,
        reading: Reading,
        units: int,
        curvature: Curvature,
        inverse: DimIds | None = None,
        product: DimIds | None = None,
    ) -> None:
        self.units, self.inverse, self.product = units, inverse, product
        alone = reading.sum(curvature.alone, units)
        self.constant = alone if inverse is None else np.zeros(units)
        self.entries = 0 if inverse is None else inverse.shape[1]
        group, place = np.divmod(reading.entry, curvature.consumer.shape[1])
        places = (place[:, None] * curvature.taps + np.arange(curvature.taps)).ravel()
        unit, group = np.repeat(reading.unit, curvature.taps), np.repeat(group, curvature.taps)
        order = np.lexsort((places, group, unit))
        keys = (unit * (group.max(initial=0) + 1) + group)[order]
        self.share = np.zeros(units)  # of what a unit alone would lose, by what the factors say of it
        if inverse is not None:
            estimated = reading.sum(curvature.estimated, units)
            np.divide(alone, estimated, out=self.share, where=estimated > 0)
        self.parts = []  # (unit, group, entries that leave with it there)
        for part in (
            np.split(order, np.flatnonzero(np.diff(keys)) + 1) if len(order) and inverse is not None else ()
        ):
            self.parts.append((int(unit[part[0]]), int(group[part[0]]), places[part]))

    def scores(self) -> DimIds:
        """What each unit's leaving would add now."""
        found = self.constant.copy()
        if self.inverse is None or self.product is None:
            return found
        sizes: dict[int, list[tuple[int, int, DimIds]]] = {}
        for part in self.parts:
            sizes.setdefault(len(part[2]), []).append(part)
        for parts in sizes.values():
            unit, group = np.array([p[0] for p in parts]), np.array([p[1] for p in parts])
            where = np.stack([p[2] for p in parts])
            at = group[:, None, None], where[:, :, None], where[:, None, :]
            lost = np.trace(np.linalg.solve(self.inverse[at], self.product[at]), axis1=1, axis2=2)
            found += np.bincount(unit, weights=np.maximum(lost, 0.0), minlength=self.units) * self.share
        return found

    def remove(self, units: DimIds) -> None:
        """Downdate H^-1 and W G W^T by the entries of these units, which are set to what is best for the rest."""
        self.constant[units] = 0.0
        if self.inverse is None or self.product is None:
            return
        leaving = set(units.tolist())
        by_group: dict[int, list[DimIds]] = {}
        for _, group, where in (part for part in self.parts if part[0] in leaving):
            by_group.setdefault(group, []).append(where)
        for group, parts in by_group.items():
            _downdate(self.inverse[group], self.product[group], np.concatenate(parts))
        self.parts = [part for part in self.parts if part[0] not in leaving]


def _downdate(inverse: DimIds, product: DimIds, where: DimIds) -> None:
    """Take entries out of H^-1 and of P = W G W^T, in place.

    With S = H^-1[:, where] (H^-1[where, where])^-1, the weights of the rest change by -S W[where], so that
    P becomes P - S R - (S R)^T + S I S^T with R = P[where] and I = P[where, where], which is P - T - T^T with
    T = S (R - I S^T / 2): one product of matrices instead of two.
    """
    step = np.linalg.solve(inverse[np.ix_(where, where)], inverse[where]).T  # [entries, leaving]
    inverse -= step @ inverse[where]
    half = step @ (product[where] - product[np.ix_(where, where)] @ (step.T / 2))
    product -= half
    product -= half.T
    for matrix in (inverse, product):
        matrix[where] = 0.0
        matrix[:, where] = 0.0
    inverse[where, where] = 1.0


named("kfac", lambda seed: KFAC())
