"""Names, leaves and the architecture of a model: its parameters and buffers, and the tensors in nests of
inputs and outputs.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError
from surgeon.graph.module_tree import named_modules, named_registered
from surgeon.graph.nests import attributes

OF_TORCH = frozenset(nn.Module().__dict__)  # what every module holds


def architecture(model: nn.Module) -> str:
    """A digest of the names, shapes and sharing of a model's parameters, and of the names of its buffers
    (whose shapes a run may change); not of their values."""
    first: dict[int, str] = {}
    lines = [
        type(model).__qualname__,
        *(name for name, _ in named_registered(model, "_buffers", every_name=True)),
    ]
    for name, tensor in named_registered(model, "_parameters", every_name=True):
        owner = first.setdefault(id(tensor), name)
        lines.append(f"{name}:{tuple(tensor.shape)}" if owner == name else f"{name}={owner}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter, buffer and plain tensor attribute under every name that it has."""
    found = []
    for prefix, module in named_modules(model, every_name=True):
        own = module.__dict__
        for store in (module._parameters, module._buffers, own):
            for name, value in store.items():
                if (store is not own or name not in OF_TORCH) and isinstance(value, Tensor):
                    found.append((f"{prefix}.{name}" if prefix else name, value))
    return found


def tensor_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nest of dicts, lists, tuples, dataclasses and plain objects, with their paths."""
    yield from _leaves(value, path, set())


def named(leaves: list[tuple[str, Tensor]], names: Sequence[str] | None) -> list[tuple[str, Tensor]]:
    """Those of a model's outputs that have one of the names or lie below one; all if there are no names.

    Raises:
        InputError: a name is none of an output.
    """
    if names is None:
        return leaves
    found = [
        (path, tensor) for path, tensor in leaves if any(path == n or path.startswith(f"{n}.") for n in names)
    ]
    for name in names:
        if not any(path == name or path.startswith(f"{name}.") for path, _ in found):
            known = ", ".join(repr(path) for path, _ in leaves[:20])
            raise InputError(f"the model has no output {name!r}", fix=f"use some of {known}")
    return found


def copied_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the same values in memory of its own; a computed one without what it was computed from."""
    if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter) and tensor.is_leaf:
        return copy.deepcopy(tensor)  # a subclass knows what it consists of
    new = like(tensor, tensor.detach().clone())
    if tensor.is_leaf and tensor.grad is not None:
        new.grad = tensor.grad.detach().clone()
    return new


def like(tensor: Tensor, data: Tensor) -> Tensor:
    """New data as a parameter, if the tensor is one, and with gradients where it asks for them."""
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(data, requires_grad=tensor.requires_grad)
        new.__class__ = type(tensor)
        return new
    return data.requires_grad_(tensor.requires_grad and tensor.is_leaf)


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, along a last dim; other tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _leaves(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    if value is None or isinstance(value, str | bytes | int | float | complex | bool) or id(value) in seen:
        return
    seen = seen | {id(value)}
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    elif dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif isinstance(value, nn.Module | type | ModuleType):
        return
    else:
        items = iter(attributes(value).items())
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key), seen)
