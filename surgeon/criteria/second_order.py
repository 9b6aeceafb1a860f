"""The second-order criterion from what consumers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surgeon.calibration import WIDEST
from surgeon.calibration.evidence import Reading, Statistics
from surgeon.criteria.measured import FromReadings
from surgeon.errors import InputError
from surgeon.groups import Group
from surgeon.labels import Track


class OBS(FromReadings):
    """How far a consumer's outputs move if a unit leaves and the weights that stay make up for it as well as they can.

    With H = E x x^T + damping * mean(diag) * I over a consumer's data, and S the entries that leave with a unit: the sum over
    all rows i of its weights of W_iS ([H^-1]_SS)^-1 W_iS^T; for a single entry j that is sum_i W_ij^2 / [H^-1]_jj. A
    convolution's taps share one H. (Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
    1993; Frantar and Alistarh, Optimal Brain Compression, 2022; Kurtic et al., ZipLM, 2023.)
    """

    name = "obs"
    needs: ClassVar[frozenset[str]] = frozenset(("covariance",))

    def __init__(self, damping: float = 0.01, widest: int = WIDEST, combine: str = "sum", normalize: str | None = "mean") -> None:
        super().__init__(combine, normalize)
        if not damping > 0:
            raise InputError(
                f"damping must be positive, got {damping}", where="OBS", why="H has no inverse where channels are dead"
            )
        self.damping, self.widest = damping, widest

    def part(self, reading: Reading, units: int) -> Track:
        found = reading.statistics
        inverse, product = self._inverses(found), self._product(found)
        groups, width = found.consumer.shape
        group, place = np.divmod(reading.entry, width)
        if len(np.unique(reading.unit * groups + group)) == len(reading.unit):  # one entry in each block: no block to invert
            values = product.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)
            return reading.sum(values, units)
        scores = np.zeros(units)
        order = np.lexsort((place, group, reading.unit))
        keys = (reading.unit * groups + group)[order]
        for part in np.split(order, np.flatnonzero(np.diff(keys)) + 1):
            block = group[part[0]]
            where = torch.from_numpy(place[part])
            inner = inverse[block][where][:, where]
            scores[reading.unit[part[0]]] += float(torch.linalg.solve(inner, product[block][where][:, where]).trace())
        return scores

    def _product(self, found: Statistics) -> Tensor:
        """W W^T of each group."""
        return found.weight_product / found.weight_share

    def _inverses(self, found: Statistics) -> Tensor:
        hessian = found.covariance / max(found.count, 1)
        return torch.stack([self._inverse(block) for block in hessian])

    def _inverse(self, hessian: Tensor) -> Tensor:
        mean = float(hessian.diagonal().mean())
        ridge = max(self.damping * mean, 1e-30)
        damped = hessian + ridge * torch.eye(len(hessian), dtype=hessian.dtype)
        return torch.cholesky_inverse(torch.linalg.cholesky(damped))


class KFAC(OBS):
    """How far the model's outputs move if a unit leaves and the weights that stay make up for it: OBS with each output of a
    consumer weighed by how much the model's outputs hang on it, G = E g^2.

    The units of a group leave one after the other in this reckoning, the least first, and H^-1 and the weights are brought up to
    date each time; a unit's score is what its own leaving adds. Scores are squared distances of the outputs (or, with a loss, of
    the loss's curvature), so they add up, and those of different groups compare. (Martens and Grosse, Optimizing Neural Networks
    with Kronecker-factored Approximate Curvature, 2015; Wang et al., EigenDamage, 2019; van der Ouderaa et al., The LLM
    Surgeon, 2024.)

    Args:
        widest: entries of one group of a consumer up to which units leave one by one; beyond, each is scored as if alone.
    """

    name = "kfac"
    needs: ClassVar[frozenset[str]] = frozenset(("covariance", "output_gradients"))
    additive = True

    def __init__(self, damping: float = 0.01, widest: int = WIDEST, stepwise: int = 1024) -> None:
        super().__init__(damping, widest, "sum", None)
        self.stepwise = stepwise

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Track:
        readings = self.evidence.of(group)
        alone = super().__call__(group, tensors)
        single = all(len(np.unique(r.unit * r.statistics.consumer.shape[0] + self._block(r))) == len(r.unit) for r in readings)
        if not single or any(r.statistics.consumer.shape[1] > self.stepwise for r in readings):
            return alone
        return self._one_by_one(readings, group.units)

    def _block(self, reading: Reading) -> Track:
        found: Track = reading.entry // reading.statistics.consumer.shape[1]
        return found

    def _product(self, found: Statistics) -> Tensor:
        if found.weight is None:
            return found.weight_product / found.weight_share
        return (found.weight * found.felt_after[:, None]) @ found.weight.transpose(1, 2)

    def _one_by_one(self, readings: Sequence[Reading], units: int) -> Track:
        left = [_Left(reading, self._inverses(reading.statistics), self._product(reading.statistics)) for reading in readings]
        scores, gone = np.zeros(units), np.zeros(units, dtype=bool)
        most = 0.0
        for number in range(units):
            now = sum((item.scores(units) for item in left), start=np.zeros(units))
            now[gone] = np.inf
            unit = int(np.argmin(now))
            most = max(most * (1 + 1e-12), float(now[unit]))
            scores[unit], gone[unit] = most, True
            if number < units - 1:
                for item in left:
                    item.remove(unit)
        return scores


class _Left:
    """H^-1 and W G W^T of one consumer, less the entries that have left."""

    def __init__(self, reading: Reading, inverse: Tensor, product: Tensor) -> None:
        self.unit = reading.unit
        self.group, self.place = np.divmod(reading.entry, reading.statistics.consumer.shape[1])
        self.inverse, self.product = inverse.numpy().copy(), product.numpy().copy()

    def scores(self, units: int) -> Track:
        own = self.group, self.place, self.place
        part = np.maximum(self.product[own], 0.0) / np.maximum(self.inverse[own], 1e-300)
        found: Track = np.bincount(self.unit, weights=part, minlength=units)
        return found

    def remove(self, unit: int) -> None:
        for i in np.flatnonzero(self.unit == unit):
            group, place = self.group[i], self.place[i]
            inverse, product = self.inverse[group], self.product[group]
            step = inverse[:, place] / inverse[place, place]
            row = product[place].copy()
            inverse -= np.outer(step, inverse[place])
            product += np.outer(step, step) * row[place] - np.outer(step, row) - np.outer(row, step)
            inverse[place], inverse[:, place] = 0.0, 0.0
            product[place], product[:, place] = 0.0, 0.0
            inverse[place, place] = 1.0
