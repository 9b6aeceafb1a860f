"""Criteria that need nothing but the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import InputError
from surgeon.groups import Group
from surgeon.labels import Track


class Norm:
    """Mean over a group's weights of the Lp norm of what leaves with a unit.

    For each weight (a tensor with two or more dims) that the group slices: the p-norm of all entries that leave, divided by
    the mean of these norms over the units, so that large and small layers count alike. Vectors (biases, norm scales) only
    speak where a group has no weight. (Li et al., Pruning Filters for Efficient ConvNets, 2017, for one layer and p = 1;
    the mean over coupled layers is Fang et al., DepGraph, 2023.)
    """

    def __init__(self, p: int) -> None:
        self.p = p
        self._sums: dict[int, tuple[Track, Track]] = {}  # a weight speaks for its outputs and for its inputs

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Track:
        floats = [m for m in group.members if tensors[m.tensor].is_floating_point()]
        members = [m for m in floats if tensors[m.tensor].dim() >= 2] or floats
        total = np.zeros(group.units)
        for member in members:
            powers = self._power_sums(tensors[member.tensor].detach(), member.dim)
            norm = np.bincount(member.unit, weights=powers[member.index], minlength=group.units) ** (1 / self.p)
            total += norm / max(norm.mean(), 1e-30)
        return total / max(len(members), 1)

    def _power_sums(self, tensor: Tensor, dim: int) -> Track:
        """sum |w|^p over all dims but one."""
        known = self._sums.get(tensor.data_ptr())
        if known is not None and dim < 2 <= tensor.dim():
            return known[dim]
        work = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        work = work.abs() if self.p == 1 else work.abs() ** self.p  # plain sums are several times faster than vector_norm here
        if work.dim() < 2:
            return _array(work)
        if dim >= 2:
            return _array(work.sum([d for d in range(work.dim()) if d != dim]))
        work = work.flatten(2).sum(2) if work.dim() > 2 else work
        sums = _array(work.sum(1)), _array(work.sum(0))
        self._sums[tensor.data_ptr()] = sums
        return sums[dim]


def _array(tensor: Tensor) -> Track:
    found: Track = tensor.double().cpu().numpy()
    return found


class BatchNormScale:
    """Mean of |gamma| over the group's batch norms (Liu et al., Network Slimming, 2017).

    A vector counts as a scale if the model also holds a `running_var` beside it.

    Raises:
        InputError: a group has no batch norm.
    """

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Track:
        scales = [m for m in group.members if m.tensor.endswith("weight") and self._has_variance(m.tensor, tensors)]
        if not scales:
            raise InputError(
                "criterion 'bn_scale' needs a batch norm in every group",
                where=group.name,
                why="no batch norm with a scale follows these channels",
                fix="use criterion='l1' or 'l2', or name the layer in ignore=[...]",
            )
        total = np.zeros(group.units)
        for member in scales:
            size = tensors[member.tensor].detach().double().abs().cpu().numpy()
            total += np.bincount(member.unit, weights=size[member.index], minlength=group.units)
        return total / len(scales)

    @staticmethod
    def _has_variance(name: str, tensors: Mapping[str, Tensor]) -> bool:
        return name.removesuffix("weight") + "running_var" in tensors


class Random:
    """Uniform scores, the same for the same seed and group name whatever else the model holds."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Track:
        digest = hashlib.sha256(f"{self.seed}:{group.name}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(group.units)


def first(group: Group, tensors: Mapping[str, Tensor]) -> Track:
    """The first channels stay: for models without values, of which only the sizes are asked for."""
    return -np.arange(group.units, dtype=np.float64)
