"""composed(model, shapes, plans) -> Choice: what several plans, applied one after another, take from a
model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgeon.cut.plan import Plan, check_fit
from surgeon.cut.slice import Kept, shrink_module
from surgeon.errors import InputError, PlanError
from surgeon.selection.cost import Choice, ShapeModel


def composed(model: nn.Module, shapes: ShapeModel, plans: Sequence[Plan]) -> Choice:
    """The choice that leaves what the last plan leaves.

    Args:
        model: that the first plan fits; each other plan fits what the one before it leaves.

    Raises:
        InputError: there is no plan.
        PlanError: a plan does not fit, or removes what no choice on this model's recorded run can.
    """
    if not plans:
        raise InputError(
            "there is no plan to compose", fix="pass the plans in the order in which they were applied"
        )
    kept = _kept(model, plans)
    choice = shapes.chosen(kept)
    left = shapes.kept(choice)
    for name, dim in (
        (name, dim) for tensors in (kept, left) for name, dims in tensors.items() for dim in dims
    ):
        if kept.get(name, {}).get(dim) != left.get(name, {}).get(dim):
            raise _no_choice(name, dim)
    return choice


def _kept(model: nn.Module, plans: Sequence[Plan]) -> Kept:
    """Indices of the model's tensors that are left after all plans."""
    found: dict[str, dict[int, list[int]]] = {}
    for number, plan in enumerate(plans, 1):
        check_fit(plan, model)
        for name, dims in plan.kept.items():
            here = found.setdefault(name, {})
            for dim, indices in dims.items():
                here[dim] = [here[dim][index] for index in indices] if dim in here else indices
        if number < len(plans):
            model = shrink_module(model, plan.kept)
    return found


def _no_choice(name: str, dim: int) -> PlanError:
    return PlanError(
        "these plans cannot be one",
        where=f"{name}[{dim}]",
        why="on the model as it was recorded here, the channels that they remove do not leave by themselves",
        fix="apply them one after another",
    )
