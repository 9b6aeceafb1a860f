"""Masks: those of torch.nn.utils.prune, and those that are given by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from surgeon.cut.plan import Plan
from surgeon.errors import InputError
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.tensors import architecture, named_tensors

ORIG, MASK = "_orig", "_mask"


def pruned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, name) of every tensor that a mask of torch.nn.utils.prune is multiplied into."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                yield path, module, str(hook._tensor_name)


def check_values(model: nn.Module) -> None:
    """Refuse a model on the meta device.

    Raises:
        InputError: its weights have no values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "the weights have no values (meta device)",
            fix="load the weights, then count, mask or compact them",
        )


def check_pruned(model: nn.Module) -> None:
    """Refuse masks that torch.nn.utils.prune did not finish, or that were taken apart.

    Raises:
        InputError: a module has a `..._orig` without its mask, a mask without its `..._orig`, or both and no hook that
            multiplies them.
    """
    known = {(path, name) for path, _, name in pruned(model)}
    for path, module in model.named_modules():
        given = {n.removesuffix(ORIG) for n in module._parameters if n.endswith(ORIG)}
        masks = {n.removesuffix(MASK) for n in module._buffers if n.endswith(MASK)}
        hooked = {name for at, name in known if at == path}
        for name in sorted((given & masks) | hooked):
            if name not in given or name not in masks or name not in hooked:
                raise _half(path, name)


def _half(path: str, name: str) -> InputError:
    return InputError(
        "a mask is only half there",
        where=f"{path}.{name}".lstrip("."),
        why=f"torch.nn.utils.prune keeps {name}{ORIG}, {name}{MASK} and a hook that multiplies them; not all of them are there",
        fix=f"prune the module anew, or set {name} as a parameter and delete what is left",
    )


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with masks multiplied into its tensors.

    Args:
        masks: by the tensor's name, of its shape; zero or False where it is to be zero.

    Raises:
        InputError: a name is unknown, a mask has another shape or other numbers than 0 and 1, or a tensor is shared.
    """
    small = copied(model)
    tensors = dict(named_tensors(small))
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for name, mask in masks.items():
        if name not in tensors:
            near = [n for n in tensors if n.startswith(f"{name}.")][:3]
            raise InputError(
                f"the model has no tensor '{name}'",
                why=f"masks go by the names of tensors, such as {', '.join(near)}" if near else "",
                fix="use names as in model.state_dict()",
            )
        tensor = tensors[name]
        if isinstance(mask, Tensor) and (mask.layout is not torch.strided or mask.is_meta):
            raise InputError("the mask is sparse or has no values", where=name, fix="pass mask.to_dense()")
        if not isinstance(mask, Tensor) or mask.shape != tensor.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"the mask has shape {shape}, its tensor {tuple(tensor.shape)}",
                where=name,
                fix="pass one number, 0 or 1, for each entry of the tensor",
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("a mask holds other numbers than 0 and 1", where=name, fix="pass (mask != 0)")
        if len(names[id(tensor)]) > 1:
            raise InputError(
                "a mask of a tensor that several modules share",
                where=", ".join(names[id(tensor)]),
                why="what is masked for one of them would be masked for all",
                fix="take the mask out, or give each module a tensor of its own",
            )
        with torch.no_grad():
            tensor.masked_fill_(mask.to(tensor.device) == 0, 0)
    return small


def settle(model: nn.Module, permanent: bool) -> tuple[list[str], list[str]]:
    """Take off masks that mask nothing any more, or all of them, into the weights.

    Returns:
        The names of the tensors whose mask is off, and of those whose mask stays.
    """
    off: list[str] = []
    stay: list[str] = []
    for path, module, name in list(pruned(model)):
        spent = permanent or bool((getattr(module, f"{name}{MASK}") != 0).all())
        (off if spent else stay).append(f"{path}.{name}".lstrip("."))
        if spent:
            _take_off(module, name)
    return off, stay


def _take_off(module: nn.Module, name: str) -> None:
    """Make a mask permanent; the tensor stands where torch's layers have it, not behind all others."""
    prune.remove(module, name)
    if name == "weight":
        others = {key: module._parameters.pop(key) for key in list(module._parameters) if key != name}
        module._parameters.update(others)


def plan_without(plan: Plan, model: nn.Module, off: Collection[str]) -> Plan:
    """The plan for the model without some of its masks, as its class makes it.

    Args:
        model: that the plan was made for.
        off: names of the tensors whose masks are taken off.
    """
    plain = copied(model)
    for path, module, name in list(pruned(plain)):
        if f"{path}.{name}".lstrip(".") in off:
            _take_off(module, name)
    renamed = {f"{name}{ORIG}": name for name in off}
    gone = {f"{name}{MASK}" for name in off}
    kept = {renamed.get(name, name): dims for name, dims in plan.kept.items() if name not in gone}
    return dataclasses.replace(plan, kept=kept, hash=architecture(plain))


def zeros(model: nn.Module) -> tuple[int, int]:
    """How many of the weights (parameters of two or more dims, tied ones once) are zero or masked, and how many there are."""
    hidden = {id(getattr(m, f"{name}{ORIG}")): getattr(m, f"{name}{MASK}") for _, m, name in pruned(model)}
    found = total = 0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            held = parameter.detach() != 0
            found += int((~(held & (hidden.get(id(parameter), held) != 0))).sum())
            total += parameter.numel()
    return found, total


def plain_name(name: str) -> str:
    """A tensor or slot as its module names it: `conv.weight[0]` for `conv.weight_orig[0]`."""
    return re.sub(rf"({ORIG}|{MASK})(?=\[|$)", "", name)
