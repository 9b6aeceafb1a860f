"""Criteria that need nothing but the sizes of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from surgeon.coupling.groups import Group, Member
from surgeon.criteria.combine import Combined, array, by_unit, weights
from surgeon.criteria.names import named
from surgeon.errors import InputError
from surgeon.ops.ids import DimIds


class Norm(Combined):
    """The Lp norm of what leaves with a unit, of each weight that the group slices: (sum |w|^p)^(1/p) over
    what leaves.

    Vectors (biases, norm scales) only speak where a group has no weight. (Li et al., Pruning Filters for
    Efficient ConvNets, 2017, for one layer and p = 1; the mean over coupled layers is Fang et al., DepGraph,
    2023.)
    """

    def __init__(self, p: float = 1, combine: str = "mean", normalize: str | None = "mean") -> None:
        if not p > 0 or p == float("inf"):
            raise InputError(f"p must be a positive number, got {p}", where=type(self).__name__)
        super().__init__(combine, normalize)
        self.p = p
        # a weight counts for its outputs and for its inputs
        self._sums: dict[int, tuple[DimIds, DimIds]] = {}

    def fresh(self) -> Self:
        """A copy without what was computed for another model."""
        found = super().fresh()
        found._sums = {}
        return found

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        return self.combined(
            [self.part(m, tensors, group.units) for m in weights(group, tensors)], group.units
        )

    def part(self, member: Member, tensors: Mapping[str, Tensor], units: int) -> DimIds:
        """The norm of what one slot loses with each unit."""
        powers = self._power_sums(tensors[member.tensor].detach(), member.dim)
        norm: DimIds = by_unit(member, powers, units) ** (1 / self.p)
        return norm

    def _power_sums(self, tensor: Tensor, dim: int) -> DimIds:
        """sum |w|^p over all dims but one."""
        known = self._sums.get(tensor.data_ptr())
        if known is not None and dim < 2 <= tensor.dim():
            return known[dim]
        work = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        work = (
            work.abs() if self.p == 1 else work.abs() ** self.p
        )  # plain sums are several times faster than vector_norm here
        if work.dim() < 2:
            return array(work)
        if dim >= 2:
            return array(work.sum([d for d in range(work.dim()) if d != dim]))
        work = work.flatten(2).sum(2) if work.dim() > 2 else work
        sums = array(work.sum(1)), array(work.sum(0))
        self._sums[tensor.data_ptr()] = sums
        return sums[dim]


class Lamp(Norm):
    """Layer-adaptive magnitude: s_u / (sum of s_v over u and all units v of the group above it), s the
    combined squared L2 norms.

    Of one group the order is that of s; between groups, the last unit of each scores 1, so that no group is
    emptied. (Lee et al., Layer-Adaptive Sparsity for the Magnitude-Based Pruning, 2021; there for single
    weights.)
    """

    def __init__(self, combine: str = "mean", normalize: str | None = None) -> None:
        super().__init__(2, combine, normalize)

    def part(self, member: Member, tensors: Mapping[str, Tensor], units: int) -> DimIds:
        """One score per unit from one slot of the group."""
        return super().part(member, tensors, units) ** 2

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        size = super().__call__(group, tensors)
        order = np.argsort(size, kind="stable")
        found = np.zeros(len(size))
        above = np.cumsum(size[order][::-1])[::-1]
        found[order] = size[order] / np.maximum(above, 1e-30)
        return found


class BatchNormScale(Combined):
    """|gamma| of the group's batch norms (Liu et al., Learning Efficient Convolutional Networks through
    Network Slimming, 2017).

    A vector counts as a scale if the model also holds a `running_var` beside it.

    Raises:
        InputError: a group has no batch norm.
    """

    def __init__(self, combine: str = "mean", normalize: str | None = None) -> None:
        super().__init__(combine, normalize)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        found = scales(group, tensors)
        if not found:
            raise InputError(
                "criterion 'bn_scale' needs a batch norm in every group",
                where=group.name,
                why="no batch norm with a scale follows these channels",
                fix="use criterion='l1' or 'l2', or name the layer in ignore=[...]",
            )
        return self.combined(
            [by_unit(m, np.abs(array(tensors[m.tensor])), group.units) for m in found], group.units
        )


def scales(group: Group, tensors: Mapping[str, Tensor]) -> list[Member]:
    """The scales of the group's batch norms: vectors beside which the model holds a `running_var`."""
    norms = {name.removesuffix("running_var") for name in tensors if name.endswith("running_var")}
    return [
        m for m in group.members if m.tensor.endswith("weight") and m.tensor.removesuffix("weight") in norms
    ]


class Random:
    """Uniform scores, the same for the same seed and group name whatever else the model holds."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        digest = hashlib.sha256(f"{self.seed}:{group.name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(group.units)


def first(group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
    """The first channels stay: for models without values, of which only the sizes are asked for."""
    return -np.arange(group.units, dtype=np.float64)


named("l1", lambda seed: Norm(1))
named("l2", lambda seed: Norm(2))
named("lamp", lambda seed: Lamp())
named("bn_scale", lambda seed: BatchNormScale())
named("random", Random)
named("first", lambda seed: first)
