"""The modules of a model and the tensors that they register, as lists: one call for each module that holds others.

What torch yields under the same names, without its generators within generators: a stage asks many times.
"""

from __future__ import annotations

from torch import Tensor, nn


def named_modules(model: nn.Module, every_name: bool = False) -> list[tuple[str, nn.Module]]:
    """(path, module) of a model and all modules below it, as `named_modules` gives them.

    Args:
        every_name: a module that is held under several names comes under each of them, not once.
    """
    found = [("", model)]
    if model._modules:
        _add_inner(model, "", None if every_name else {id(model)}, found)
    return found


def _add_inner(
    module: nn.Module, path: str, seen: set[int] | None, found: list[tuple[str, nn.Module]]
) -> None:
    for name, inner in module._modules.items():
        if inner is None:
            continue
        if seen is not None:
            if id(inner) in seen:
                continue
            seen.add(id(inner))
        inner_path = f"{path}.{name}" if path else name
        found.append((inner_path, inner))
        if inner._modules:
            _add_inner(inner, inner_path, seen, found)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A model and all modules below it, once each."""
    return [module for _, module in named_modules(model)]


def named_registered(model: nn.Module, store: str, every_name: bool = False) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what the modules of a model hold in one store.

    Args:
        store: "_parameters" or "_buffers".
        every_name: a tensor that is held under several names comes under each of them, not once.
    """
    found = []
    seen: set[int] = set()
    for path, module in named_modules(model, every_name):
        for name, tensor in getattr(module, store).items():
            if tensor is None or (id(tensor) in seen and not every_name):
                continue
            seen.add(id(tensor))
            found.append((f"{path}.{name}" if path else name, tensor))
    return found


def parameters_of(model: nn.Module) -> list[Tensor]:
    """The parameters of a model, once each."""
    return [tensor for _, tensor in named_registered(model, "_parameters")]


def registered_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model, once each."""
    return [*parameters_of(model), *(tensor for _, tensor in named_registered(model, "_buffers"))]
