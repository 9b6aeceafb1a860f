"""carry(optimizer, model, small, kept): the optimizer of a model goes on with the small one; its state is
sliced like the weights.

The optimizer object stays, with its param groups, so that a training loop and its schedules go on. In each
group the small model's parameters take the places of the model's; state of a parameter's shape (momenta, mean
squares) loses what the parameter lost, numbers (steps) stay. Everything is checked before anything is
changed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.cut.slice import Kept, Slicer, find_cuts
from surgeon.errors import InputError
from surgeon.graph.tensors import named_tensors


def carry(optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, kept: Kept) -> None:
    """Make the optimizer step `small`, what `kept` left of `model`, instead of `model`.

    Raises:
        InputError: see `check_optimizer`.
    """
    check_optimizer(optimizer, model)
    cuts = find_cuts(model, kept)
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    tensors = dict(named_tensors(small))
    slicer = Slicer()
    state: dict[Tensor, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        cut = cuts[id(parameter)][1]
        state[tensors[names[id(parameter)]]] = {
            key: slicer(value, cut) if _is_like(value, parameter) else copy.deepcopy(value)
            for key, value in values.items()
        }
    for group in optimizer.param_groups:
        group["params"] = [tensors[names[id(parameter)]] for parameter in group["params"]]
    optimizer.state.clear()
    optimizer.state.update(state)


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer whose parameters are not the model's, or whose state cannot be sliced.

    Raises:
        InputError: all foreign parameters are named by their group and place; state by its name and its
            parameter's.
    """
    known = {id(tensor): name for name, tensor in named_tensors(model)}
    foreign = [
        f"group {number}, parameter {place}{_named(group, place)} of shape {tuple(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
        if id(parameter) not in known
    ]
    if foreign:
        raise InputError(
            f"the optimizer holds {len(foreign)} parameters that the model does not",
            where="; ".join(foreign),
            fix="pass the optimizer of this very model (of ddp.module, if it is wrapped), and of nothing else",
        )
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if not _is_like(value, parameter) and not _is_plain(value):
                shape = (
                    f"of shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else f"a {type(value).__name__}"
                )
                raise InputError(
                    f"state {key!r} of {type(optimizer).__name__} cannot be carried over: it is {shape}",
                    where=f"{known[id(parameter)]} of shape {tuple(parameter.shape)}",
                    why="only state of the parameter's shape can be sliced like it, and only numbers can stay as they are",
                    fix="apply the plan without optimizer=... and make a new optimizer for the small model",
                )


def _named(group: dict[str, Any], place: int) -> str:
    """The name that an optimizer made of named parameters knows."""
    names = group.get("param_names")
    return f" '{names[place]}'" if names else ""


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_plain(value: Any) -> bool:
    """Whether a piece of state says nothing of single entries: a number, a text, nothing."""
    return (
        value.numel() == 1
        if isinstance(value, Tensor)
        else value is None or isinstance(value, int | float | str)
    )
