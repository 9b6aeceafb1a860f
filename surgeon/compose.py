"""composed(model, shapes, plans) -> Choice: what several plans, applied one after another, take from a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from surgeon.cost import Choice, Shapes, nothing
from surgeon.errors import InputError, PlanError
from surgeon.labels import Track
from surgeon.plan import Plan, check_fit
from surgeon.rewrite import shrink_module

Slot = tuple[str, int]


def composed(model: nn.Module, shapes: Shapes, plans: Sequence[Plan]) -> Choice:
    """The choice that leaves what the last plan leaves.

    Args:
        model: that the first plan fits; each other plan fits what the one before it leaves.

    Raises:
        InputError: there is no plan.
        PlanError: a plan does not fit, or removes what no choice on this model's recorded run can.
    """
    if not plans:
        raise InputError("there is no plan to compose", fix="pass the plans in the order in which they were applied")
    gone = _gone(_kept(model, plans), shapes)
    choice = nothing(shapes.solution)
    stays = choice.copy()
    for slot, ids in shapes.propagation.slots.items():
        for atoms in shapes.solution.atoms(ids):
            choice[atoms[gone[slot] & (atoms >= 0)]] = True
            stays[atoms[~gone[slot] & (atoms >= 0)]] = True
    choice &= ~stays
    for slot, ids in shapes.propagation.slots.items():
        if not np.array_equal(shapes.leaves(ids, choice), gone[slot]):
            raise _no_choice(slot)
    return choice


def _kept(model: nn.Module, plans: Sequence[Plan]) -> dict[Slot, Track]:
    """Indices of the model's tensors that are left after all plans."""
    found: dict[Slot, Track] = {}
    for number, plan in enumerate(plans, 1):
        check_fit(plan, model)
        for name, dims in plan.kept.items():
            for dim, indices in dims.items():
                before = found.get((name, dim))
                found[name, dim] = np.asarray(indices) if before is None else before[indices]
        if number < len(plans):
            model = shrink_module(model, plan.kept)
    return found


def _gone(kept: dict[Slot, Track], shapes: Shapes) -> dict[Slot, Track]:
    """For each slot of the recorded run, which entries are not kept."""
    gone = {slot: np.zeros(ids.shape, dtype=bool) for slot, ids in shapes.propagation.slots.items()}
    for slot, indices in kept.items():
        if slot not in gone:
            raise _no_choice(slot)
        gone[slot][:] = True
        gone[slot][indices] = False
    return gone


def _no_choice(slot: Slot) -> PlanError:
    return PlanError(
        "these plans cannot be one",
        where=f"{slot[0]}[{slot[1]}]",
        why="on the model as it was recorded here, the channels that they remove do not leave by themselves",
        fix="apply them one after another",
    )
