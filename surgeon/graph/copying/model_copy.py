"""copied(model) -> a model of the same class that holds nothing of the first one.

Modules are copied attribute by attribute, whatever copying protocol their class has. Functions, partials, bound
methods and weak references that lead to a part of the model lead to the same part of the copy; those that do not
are shared, and so is what cannot be copied (locks, open files, generators). What can be neither is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.graph.copying.copier import Copier, Memo
from surgeon.graph.copying.reach import first_path
from surgeon.graph.copying.rebuild import bound
from surgeon.graph.module_tree import named_modules
from surgeon.graph.process import LOCK, deep_enough
from surgeon.graph.tensors import copied_tensor, named_tensors


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model with tensors of its own.

    Raises:
        CopyError: the model holds something that leads back to it and cannot be copied.
    """
    memo: Memo = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = copied_tensor(tensor)
    return copied_with(model, memo)


def copied_with(model: nn.Module, memo: Memo) -> nn.Module:
    """A copy of a model with other tensors.

    Args:
        memo: {id of a tensor of the model: the tensor that takes its place}, for all that `named_tensors` gives.

    Raises:
        CopyError: see `copied`.
    """
    with LOCK, deep_enough(model):
        tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
        copier = Copier(model, memo)
        small: nn.Module = copier(model)
        for key, tensor in tensors.items():
            copier.attributes(tensor, memo[key])
        check_apart(model, small)
    return small


def check_apart(model: nn.Module, small: nn.Module) -> None:
    """Refuse a small model from which a module, a tensor or memory of the original can be reached.

    Raises:
        CopyError: one can; it says how.
    """
    modules = {id(module): path for path, module in named_modules(model)}
    every = named_tensors(model)
    tensors = {id(tensor): name for name, tensor in every}
    memory = {place: name for name, tensor in every if (place := _memory(tensor))}

    def of_the_original(value: Any) -> bool:
        return (
            id(value) in modules
            or id(value) in tensors
            or (isinstance(value, Tensor) and _memory(value) in memory)
        )

    found = first_path(small, of_the_original)
    if found is not None:
        way, part = found
        is_tensor = isinstance(part, Tensor)
        name = tensors.get(id(part), memory.get(_memory(part))) if is_tensor else modules[id(part)]
        raise bound(way, f"{'tensor' if is_tensor else 'module'} '{name}'")


def _memory(tensor: Tensor) -> int:
    """Where the numbers of a tensor begin; 0 if it has no memory of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()
