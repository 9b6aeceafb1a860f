"""save(small, folder), load(folder, factory): a small model on disk, as the plans that cut it and its
weights; no pickle.

The class need not know how to build itself smaller: `load` builds the original and replays the plans, so that
per-layer widths, which no configuration can say, come back as they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from surgeon.cut.plan import Plan
from surgeon.errors import InputError, PlanError
from surgeon.files import load_weights, write_atomically

_WEIGHTS = "model.safetensors"


def save(small: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `plan.json` (`plan-2.json`, ... for a model that was cut several times) and `model.safetensors`.

    Args:
        small: what `shrink` or `Plan.apply` gave, trained or recovered since, perhaps.
        folder: made if it is not there; files of these names are replaced, each atomically.

    Raises:
        InputError: the model was not made by surgeon, or its state holds something else than tensors.
        FileError: the folder cannot be written.
    """
    plans: tuple[Plan, ...] = getattr(small, "_surgeon_plans", ())
    if not plans:
        raise InputError(
            "this model carries no plan",
            where=type(small).__name__,
            why="surgeon.save keeps what surgeon.shrink and Plan.apply gave; fused models and plain models hold no plan",
            fix="save the small model before fusing it, or use safetensors.torch.save_model for other models",
        )
    path = Path(folder)
    data = safetensors.torch.save(plain_state(small))
    for number, plan in enumerate(plans):
        plan.save(path / _name(number))
    write_atomically(path / _WEIGHTS, data)
    for stale in range(len(plans), len(plans) + 100):  # of an earlier save
        if not (path / _name(stale)).exists():
            break
        (path / _name(stale)).unlink()
    return path


def load(folder: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """The model that `save` wrote.

    Args:
        folder: where.
        factory: makes the original model, with any weights.

    Raises:
        PlanError: a plan is missing, was changed, or does not fit what the factory makes.
        InputError: the weights do not fit.
    """
    path = Path(folder)
    model = factory()
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the factory makes a model without values",
            why="buffers that are not saved (position tables, say) are needed as the model makes them",
            fix="make the model on the CPU",
        )
    if not (path / _name(0)).exists():
        raise PlanError(
            "there is no saved model",
            where=str(path),
            fix="pass a folder that surgeon.save(small, folder) wrote",
        )
    number = 0
    while (path / _name(number)).exists():
        model = Plan.load(path / _name(number)).apply(model)
        number += 1
    load_weights(model, path / _WEIGHTS)
    return model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with a copy for each name (safetensors refuses shared memory): it loads strictly, tied
    weights included.

    Raises:
        InputError: it holds something else than tensors.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"the state of the model holds a {type(value).__name__}",
                where=name,
                why="safetensors files hold tensors only",
                fix="keep such state out of get_extra_state, or save it beside the weights",
            )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _name(number: int) -> str:
    return "plan.json" if number == 0 else f"plan-{number + 1}.json"
