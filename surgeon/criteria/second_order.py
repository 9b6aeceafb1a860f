"""The second-order criterion from what consumers read."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surgeon.criteria.data.evidence import Reading
from surgeon.criteria.data.gather import WIDEST
from surgeon.criteria.measured import FromReadings
from surgeon.criteria.names import named
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds


class OBS(FromReadings):
    """How far a consumer's outputs move if a unit leaves and the weights that stay make up for it as well as
    they can.

    With H = E x x^T + damping * mean(diag) * I over a consumer's data, and S the entries that leave with a
    unit: the sum over all rows i of its weights of W_iS ([H^-1]_SS)^-1 W_iS^T; for a single entry j that is
    sum_i W_ij^2 / [H^-1]_jj. A convolution's taps share one H. (Hassibi and Stork, Second Order Derivatives
    for Network Pruning: Optimal Brain Surgeon, 1993; Frantar and Alistarh, Optimal Brain Compression, 2022;
    Kurtic et al., ZipLM, 2023.)
    """

    name = "obs"
    needs: ClassVar[frozenset[str]] = frozenset(("covariance",))

    def __init__(
        self,
        damping: float = 0.01,
        widest: int = WIDEST,
        combine: str = "sum",
        normalize: str | None = "mean",
    ) -> None:
        super().__init__(combine, normalize)
        if not damping > 0:
            raise InputError(
                f"damping must be positive, got {damping}",
                where="OBS",
                why="H has no inverse where channels are dead",
            )
        self.damping, self.widest = damping, widest

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        inverse = torch.stack(
            [inverted(block, self.damping) for block in found.covariance / max(found.count, 1)]
        )
        product = found.weight_product / found.weight_share
        groups, width = found.consumer.shape
        group, place = np.divmod(reading.entry, width)
        if len(np.unique(reading.unit * groups + group)) == len(
            reading.unit
        ):  # one entry in each block: no block to invert
            values = product.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)
            return reading.sum(values, units)
        scores = np.zeros(units)
        order = np.lexsort((place, group, reading.unit))
        keys = (reading.unit * groups + group)[order]
        for part in np.split(order, np.flatnonzero(np.diff(keys)) + 1):
            block = group[part[0]]
            where = torch.from_numpy(place[part])
            inner = inverse[block][where][:, where]
            scores[reading.unit[part[0]]] += float(
                torch.linalg.solve(inner, product[block][where][:, where]).trace()
            )
        return scores


def inverted(hessian: Tensor, damping: float) -> Tensor:
    """The inverse of H + damping * mean(diag) * I."""
    ridge = max(damping * float(hessian.diagonal().mean()), 1e-30)
    damped = hessian + ridge * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


named("obs", lambda seed: OBS())
