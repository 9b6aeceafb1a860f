"""Criteria from the gradients of the parameters. E_b is the mean over the batches, g the gradient of a
batch's loss.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor

from surgeon.coupling.groups import Member
from surgeon.criteria.combine import array, by_unit
from surgeon.criteria.measured import FromParameters
from surgeon.criteria.names import named
from surgeon.ops.ids import DimIds


def _summed(values: Tensor, member: Member, units: int) -> DimIds:
    """Values of a parameter, summed over all that leaves with a unit of one slot."""
    others = [d for d in range(values.dim()) if d != member.dim]
    return by_unit(member, array(values.sum(others) if others else values), units)


class Taylor(FromParameters):
    """What the loss changes to first order if a unit leaves: E_b (sum of w * g over what leaves)^2 of each
    slot.

    `joint=False`: the sum of |w * E_b g|, which no two weights can cancel. Biases and norm scales count as
    weights. (Molchanov et al., Importance Estimation for Neural Network Pruning, 2019: the group form of a
    gate.)
    """

    name = "taylor"

    def __init__(self, joint: bool = True, combine: str = "sum", normalize: str | None = None) -> None:
        super().__init__(combine, normalize)
        self.joint = joint

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # which sums are needed depends on the form
        """Which sums over batches the form of this criterion reads."""
        return frozenset(("gates",)) if self.joint else frozenset(("gradients",))

    def part(self, member: Member, units: int) -> DimIds:
        """One score per unit from one slot of the group."""
        known = self.evidence.gradients[member.tensor]
        if self.joint:
            return by_unit(member, array(known.gate_square[member.dim]), units) / self.evidence.batches
        return _summed((known.tensor.detach() * known.total).abs(), member, units) / self.evidence.batches


class Gradient(FromParameters):
    """How large the gradients of what leaves are: sqrt(sum of E_b g^2) of each slot.

    (The gradient half of saliencies such as Mozer and Smolensky, Skeletonization, 1988; no weight enters.)
    """

    name = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset(("gradients",))

    def part(self, member: Member, units: int) -> DimIds:
        """One score per unit from one slot of the group."""
        known = self.evidence.gradients[member.tensor]
        return np.sqrt(_summed(known.square, member, units) / self.evidence.batches)


class Fisher(FromParameters):
    """What the loss rises by to second order, with the empirical Fisher as the Hessian's diagonal: 1/2 sum of
    w^2 * E_b g^2.

    Batches of one sample give the empirical Fisher itself; of larger ones the gradients are averaged before
    they are squared. (LeCun et al., Optimal Brain Damage, 1990; Theis et al., Faster Gaze Prediction with
    Dense Networks and Fisher Pruning, 2018.)
    """

    name = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset(("gradients",))

    def part(self, member: Member, units: int) -> DimIds:
        """One score per unit from one slot of the group."""
        known = self.evidence.gradients[member.tensor]
        return _summed(known.tensor.detach().double().square() * known.square, member, units) / (
            2 * self.evidence.batches
        )


named("taylor", lambda seed: Taylor())
named("gradient", lambda seed: Gradient())
named("fisher", lambda seed: Fisher())
