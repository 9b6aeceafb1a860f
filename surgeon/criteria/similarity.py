"""Criteria that compare the weights of units with each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from surgeon.coupling.groups import Group, Member
from surgeon.criteria.combine import Combined, weights
from surgeon.criteria.names import named
from surgeon.ops.ids import DimIds

_CHUNK = 1 << 22  # numbers that are made float64 at a time


class GeometricMedian(Combined):
    """Sum of the Euclidean distances of a unit's weights to those of all units of the group, in each weight
    that it slices.

    Units near the geometric median are replaced best by the others, and leave first. (He et al., Filter Pruning
    via Geometric Median for Deep Convolutional Neural Networks Acceleration, 2019; there for the filters of
    one layer.)
    """

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        return self.combined(
            [self.part(m, tensors[m.tensor], group.units) for m in weights(group, tensors)], group.units
        )

    @staticmethod
    def part(member: Member, tensor: Tensor, units: int) -> DimIds:
        """Distances from ||a - b||^2 = a.a + b.b - 2 a.b, the products in chunks."""
        rows = (
            tensor.detach().movedim(member.dim, 0).flatten(1)
            if tensor.dim() > 1
            else tensor.detach()[:, None]
        )
        order = np.argsort(member.unit, kind="stable")
        unit, index = member.unit[order], member.index[order]
        starts = np.searchsorted(unit, unit)
        number = np.arange(len(unit)) - starts  # the how-manieth index of its unit
        product = torch.zeros(units, units, dtype=torch.float64)
        step = max(1, _CHUNK // max(units, 1))
        for repeat in range(int(number.max()) + 1 if len(number) else 0):
            here = number == repeat
            mine, places = torch.from_numpy(unit[here]), torch.from_numpy(index[here])
            for start in range(0, rows.shape[1], step):
                block = torch.zeros(units, min(step, rows.shape[1] - start), dtype=torch.float64)
                block[mine] = rows[:, start : start + step].cpu()[places].double()
                product += block @ block.T
        square = product.diagonal()
        distances = (square[:, None] + square[None] - 2 * product).clamp(min=0).sqrt()
        found: DimIds = distances.fill_diagonal_(0).sum(1).numpy()
        return found


named("fpgm", lambda seed: GeometricMedian())
