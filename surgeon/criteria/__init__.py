"""Groups, tensors, perhaps batches of data -> one score per unit; low scores are removed first.

A criterion is any callable `(group, tensors) -> array of group.units scores`. `criterion(name)` finds a
built-in one; `prepare` also gathers what it needs from data. `docs/criteria.md` lists them.
"""

from surgeon.criteria.activation import (
    ActivationMean,
    ActivationNorm,
    Entropy,
    HighRank,
    TaylorActivation,
    Variance,
)
from surgeon.criteria.combine import Criterion
from surgeon.criteria.gradient import Fisher, Gradient, Taylor
from surgeon.criteria.kfac import KFAC
from surgeon.criteria.magnitude import BatchNormScale, Lamp, Norm, Random, first
from surgeon.criteria.names import BUILT_IN
from surgeon.criteria.prepare import criterion, looks_at_data, prepare, scores
from surgeon.criteria.second_order import OBS
from surgeon.criteria.similarity import GeometricMedian

__all__ = [
    "BUILT_IN",
    "KFAC",
    "OBS",
    "ActivationMean",
    "ActivationNorm",
    "BatchNormScale",
    "Criterion",
    "Entropy",
    "Fisher",
    "GeometricMedian",
    "Gradient",
    "HighRank",
    "Lamp",
    "Norm",
    "Random",
    "Taylor",
    "TaylorActivation",
    "Variance",
    "criterion",
    "first",
    "looks_at_data",
    "prepare",
    "scores",
]
