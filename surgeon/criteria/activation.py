"""Criteria from what the consumers of a group read: x_j is entry j of a consumer's data, W_:j are the weights
that multiply it.

E is the mean over samples and positions. A unit that takes several entries along sums what they add and
averages what they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from surgeon.criteria.data.evidence import Reading
from surgeon.criteria.measured import FromReadings
from surgeon.criteria.names import named
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds


class TaylorActivation(FromReadings):
    """What the loss changes to first order if a map is cleared: mean over samples of |mean over positions of
    x_j * dL/dx_j|.

    (Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017.)
    """

    name = "taylor_activation"
    needs: ClassVar[frozenset[str]] = frozenset(("activation_gradients",))

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        return reading.sum(found.sensitivity / max(found.samples, 1), units)


class ActivationMean(FromReadings):
    """E |x_j|: after a ReLU the mean activation.

    (As compared in Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
    2017.)
    """

    name = "activation_mean"
    needs: ClassVar[frozenset[str]] = frozenset(("moments",))

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        return reading.mean(found.size / max(found.count, 1), units)


class ActivationNorm(FromReadings):
    """sqrt(E x_j^2) * sum |W_:j|: how much of what a consumer gives comes from a channel.

    (Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda), 2024; there for
    single weights.)
    """

    name = "activation_l2"
    needs: ClassVar[frozenset[str]] = frozenset(("moments",))

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        root = (found.square / max(found.count, 1)).sqrt()
        return reading.sum(root * found.weight_size / found.weight_share, units)


class Variance(FromReadings):
    """Var(x_j) * sum W_:j^2: what is lost if a channel is replaced by its mean.

    (An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP), 2024.)
    """

    name = "variance"
    needs: ClassVar[frozenset[str]] = frozenset(("moments",))

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        count = max(found.count, 1)
        spread = (found.square / count - (found.total / count).square()).clamp(min=0)
        return reading.sum(spread * found.weight_square / found.weight_share, units)


class HighRank(FromReadings):
    """Mean rank of the feature maps x_j [height, width] over the samples, with torch's usual tolerance.

    Where no convolution reads a group's channels as maps, their last maps are looked at (before a
    classifier's pooling, say). (Lin et al., HRank: Filter Pruning using High-Rank Feature Map, 2020.)
    """

    name = "hrank"
    needs: ClassVar[frozenset[str]] = frozenset(("ranks",))
    missing = "no value of the recorded run holds them as maps [samples, channels, height, width]"
    instead = "'l2', or at other activations, such as 'variance'"

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        found = reading.statistics
        return reading.mean(found.ranks / max(found.samples, 1), units)


class Entropy(FromReadings):
    """Entropy over the samples of each channel's mean activation: -sum p log p of a histogram between its
    smallest and largest.

    (Luo and Wu, An Entropy-based Pruning Method for CNN Compression, 2017.)
    """

    name = "entropy"
    needs: ClassVar[frozenset[str]] = frozenset(("samples",))

    def __init__(self, bins: int = 100, combine: str = "mean", normalize: str | None = "mean") -> None:
        super().__init__(combine, normalize)
        if bins < 2:
            raise InputError(f"bins must be 2 or more, got {bins}", where="Entropy")
        self.bins = bins

    def part(self, reading: Reading, units: int) -> DimIds:
        """One score per unit from what one consumer read."""
        means = torch.cat(reading.statistics.means).flatten(1)  # [samples, entries]
        if len(means) < 2:
            raise InputError(
                "criterion 'entropy' needs two samples or more, got one",
                fix="pass more batches, or larger ones",
            )
        found = torch.stack([self._entropy(column) for column in means.T])
        return reading.mean(found, units)

    def _entropy(self, values: Tensor) -> Tensor:
        low, high = values.min(), values.max()
        place = ((values - low) / (high - low).clamp(min=1e-30) * self.bins).long().clamp(max=self.bins - 1)
        share = torch.bincount(place).double() / len(values)
        return -torch.xlogy(share, share).sum()


named("taylor_activation", lambda seed: TaylorActivation())
named("activation_mean", lambda seed: ActivationMean())
named("activation_l2", lambda seed: ActivationNorm())
named("variance", lambda seed: Variance())
named("hrank", lambda seed: HighRank())
named("entropy", lambda seed: Entropy())
