"""regularizer(surgery, kind, strength) -> Regularizer: sparse training before a cut, over the groups of units
that leave together.

Here are the kinds that only look at weights; `gates.py` has the one that learns which units to keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from surgeon.coupling.groups import Group
from surgeon.criteria.magnitude import scales
from surgeon.cut.inspected import Inspected
from surgeon.cut.plan import Plan
from surgeon.errors import InputError
from surgeon.graph.given import TEXT, Kind, check_given
from surgeon.training.features import choice_of
from surgeon.training.gates import Gates
from surgeon.training.penalty import Regularizer


class L1(Regularizer):
    """strength * sum |w|, over the weights of all units."""

    def forward(self) -> Tensor:
        """The penalty as a differentiable number."""
        return self._sum([self._by_unit(group, torch.abs) for group in self.groups])


class GroupLasso(Regularizer):
    """strength * sum over units of ||w||_2 of all that leaves together, so that it goes to zero together.

    (Wen et al., Learning Structured Sparsity in Deep Neural Networks, 2016; over coupled layers: Fang et al.,
    DepGraph, 2023.) The gradient of a unit that is zero is zero.
    """

    def forward(self) -> Tensor:
        """The penalty as a differentiable number."""
        return self._sum([_root(self._by_unit(group, torch.square)) for group in self.groups])


class BatchNormScale(Regularizer):
    """strength * sum |gamma|, over the batch norms of the groups (Liu et al., Network Slimming, 2017)."""

    def __init__(self, surgery: Inspected, strength: float, groups: list[Group], chosen: bool) -> None:
        tensors = surgery.graph.tensors
        self_scales = {group.name: scales(group, tensors) for group in groups}
        without = [name for name, members in self_scales.items() if not members]
        if len(without) == len(groups) or (without and chosen):
            raise InputError(
                "regularizer 'bn_scale' needs a batch norm in every group that is named, and in one at least",
                where=", ".join(without[:10]),
                fix="use 'group_lasso' or 'l1', or leave these groups out of groups=[...]",
            )
        super().__init__(surgery, strength, [g for g in groups if self_scales[g.name]], without)
        self._scales = self_scales

    def forward(self) -> Tensor:
        """The penalty as a differentiable number."""
        return self._sum([self._by_unit(group, torch.abs, self._scales[group.name]) for group in self.groups])


class Growing(Regularizer):
    """level / 2 * sum w^2 over the units that a plan takes; the level grows until they are gone (GReg-1; Wang
    et al., Neural Pruning via Growing Regularization, 2021). The gradient is level * w.

    level = min(ceiling, strength * (1 + steps // every)), by the steps that were counted with `step` or
    `advance`.
    """

    steps: Tensor

    def __init__(
        self,
        surgery: Inspected,
        strength: float,
        groups: list[Group],
        plan: Plan | None,
        every: int,
        ceiling: float,
    ) -> None:
        if plan is None:
            raise InputError(
                "regularizer 'growing' drives out what a plan takes", fix="pass plan=surgery.plan(...)"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1 or not ceiling > 0:
            raise InputError(f"every={every!r} must be a positive whole number, ceiling={ceiling!r} positive")
        choice = choice_of(surgery, plan)
        leaving = {group.name: choice[group.sets.ravel()] for group in groups}
        super().__init__(surgery, strength, [g for g in groups if leaving[g.name].any()])
        if not self.groups:
            raise InputError(
                "the plan takes no unit of these groups",
                fix="pass the plan that is to be applied, and its groups",
            )
        self._leaving = leaving
        self.every, self.ceiling = every, ceiling
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def level(self) -> float:
        """The weight of the penalty after the steps that were counted."""
        return min(self.ceiling, self.strength * (1 + int(self.steps) // self.every))

    def forward(self) -> Tensor:
        """The penalty as a differentiable number."""
        found = []
        for group in self.groups:
            squares = self._by_unit(group, torch.square)
            found.append(squares[torch.from_numpy(self._leaving[group.name]).to(squares.device)].sum())
        return torch.stack([part.to(found[0].device) for part in found]).sum() * (self.level / 2)

    def advance(self) -> None:
        """Count one step."""
        self.steps += 1


_SURGERY = Kind(
    "a surgery", lambda value: hasattr(value, "without_values"), "pass what surgeon.inspect(model, ...) gave"
)
KINDS = ("l1", "group_lasso", "bn_scale", "growing", "l0")


def regularizer(
    surgery: Inspected,
    kind: str,
    strength: float,
    *,
    groups: Iterable[Group | str] | None = None,
    plan: Plan | None = None,
    every: int = 10,
    ceiling: float = 1.0,
    open_share: float = 0.9,
    seed: int = 0,
) -> Regularizer:
    """A penalty that makes units of `surgery.model` go to zero while it trains, so that a later cut costs
    little.

    Args:
        kind: "l1", "group_lasso", "bn_scale", "growing" (needs `plan`) or "l0" (learnable gates, see
            `gates.Gates`).
        strength: of the penalty; for "growing" what its level grows by.
        groups: of `surgery.groups`, or their names; by default all that the kind can hold on to (`.without`
            names the others).
        plan: what is to leave ("growing"). every: steps between two rises of the level. ceiling: where it
            stops.
        open_share: how likely each gate is open at the start ("l0"). seed: of the gates' start.

    Raises:
        InputError: an unknown kind, a negative strength, a group that is none of the surgery's, or none that
            this kind can hold on to.
    """
    check_given(
        "surgeon.regularizer(surgery, kind, strength)", surgery=(surgery, _SURGERY), kind=(kind, TEXT)
    )
    if kind not in KINDS:
        raise InputError(f"unknown regularizer {kind!r}", fix=f"use one of {', '.join(KINDS)}")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise InputError(f"the strength of a regularizer must be a number from 0 on, got {strength!r}")
    if surgery.without_values:
        raise InputError(
            "the weights have no values (meta device)", fix="load the weights, then inspect the model"
        )
    covered = _chosen(surgery, groups)
    if kind == "bn_scale":
        return BatchNormScale(surgery, strength, covered, groups is not None)
    if kind == "growing":
        return Growing(surgery, strength, covered, plan, every, ceiling)
    if kind == "l0":
        return Gates(surgery, strength, covered, groups is not None, open_share, seed)
    return (L1 if kind == "l1" else GroupLasso)(surgery, strength, covered)


def _chosen(surgery: Inspected, groups: Iterable[Group | str] | None) -> list[Group]:
    known = {group.name: group for group in surgery.groups}
    found = list(known.values()) if groups is None else []
    for item in groups or ():
        name = item if isinstance(item, str) else item.name
        if name not in known:
            raise InputError(
                f"the surgery has no group '{name}'", fix="use names or objects of surgery.groups"
            )
        found.append(known[name] if isinstance(item, str) else item)
    if not found:
        raise InputError(
            "there is no group to hold on to",
            why="nothing may leave this model" if groups is None else "groups is empty",
        )
    return found


def _root(squares: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    some = squares > 0
    return torch.where(some, squares, torch.ones_like(squares)).sqrt() * some


__all__ = ["KINDS", "L1", "BatchNormScale", "GroupLasso", "Growing", "Regularizer", "regularizer"]
