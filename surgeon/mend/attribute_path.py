"""Whole numbers that a module keeps, by path ("num_heads", "config.hidden_size", "normalized_shape.0"): to list
them, to read one, to put another in its place.

A path may come from a file. It leads through what objects hold as data: their own attributes, items of lists, tuples
and dicts. It runs no code of a property, calls nothing, and leads into no other module, function or class.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from surgeon.graph.source_code import own_classes

OF_TORCH = frozenset(vars(nn.Module()))  # what a module keeps for torch
_NO_DATA = (
    nn.Module, Tensor, type, functools.partial, types.ModuleType, types.FunctionType, types.MethodType,
    types.BuiltinFunctionType,
)  # fmt: skip


def number_at(module: nn.Module, path: str) -> int:
    """The whole number at a path.

    Raises:
        ValueError: there is none, or the path leads to or through something else than data.
    """
    owner: Any = module
    for part in path.split("."):
        owner = _step(owner, part)
    if not isinstance(owner, int) or isinstance(owner, bool):
        raise ValueError(f"it holds {_said(owner)}, not a whole number")
    return owner


def get_path(owner: Any, path: str) -> Any:
    """What a path leads to among the attributes and items of any object; None if there is no such thing."""
    for part in path.split("."):
        if isinstance(owner, list | tuple):
            owner = owner[int(part)]
        elif isinstance(owner, dict):
            owner = owner.get(part)
        else:
            owner = getattr(owner, part, None)
    return owner


def set_path(owner: Any, path: str, value: Any) -> None:
    """Set the number at `path`; tuples on the way are replaced by new ones."""
    *front, last = path.split(".")
    if not front:
        setattr(owner, last, value)
        return
    holder = get_path(owner, ".".join(front))
    if isinstance(holder, tuple):
        new = [*holder]
        new[int(last)] = value
        named = hasattr(holder, "_fields")
        set_path(owner, ".".join(front), type(holder)(*new) if named else type(holder)(new))
    elif isinstance(holder, list):
        holder[int(last)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        try:
            setattr(holder, last, value)
        except dataclasses.FrozenInstanceError:  # it is the small model's own
            object.__setattr__(holder, last, value)


def _step(owner: Any, part: str) -> Any:
    if isinstance(owner, list | tuple):
        if not part.isdecimal() or int(part) >= len(owner):
            raise ValueError(f"a list of {len(owner)} has no item {part}")
        found = owner[int(part)]
    elif isinstance(owner, dict):
        if part not in owner:
            raise ValueError(f"nothing is called {part!r} there")
        found = owner[part]
    else:
        found = _attribute(owner, part)
    if isinstance(found, _NO_DATA):
        raise ValueError(f"{part!r} is a {type(found).__name__}, not data")
    return found


def _attribute(owner: Any, name: str) -> Any:
    """An attribute that an object holds itself; of a module also a number that its class holds, if the class is not
    torch's.
    """
    classes = own_classes(owner) if isinstance(owner, nn.Module) else []
    if name.startswith("__") or (isinstance(owner, nn.Module) and name in OF_TORCH):
        raise ValueError(f"{name!r} is Python's or torch's, not the module's")
    if isinstance(inspect.getattr_static(type(owner), name, None), property | types.GetSetDescriptorType):
        raise ValueError(f"{name!r} is computed")
    held = getattr(owner, "__dict__", {})
    for space in (held, *(vars(kind) for kind in classes)):
        if name in space:
            return space[name]
    raise ValueError(f"nothing is called {name!r} there")


def _said(value: Any) -> str:
    text = repr(value) if isinstance(value, str | bool | float | type(None)) else f"a {type(value).__name__}"
    return text[:60]


def integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every whole number that a module keeps: attributes, numbers in its tuples and lists, and in plain
    objects it holds.

    Those of its class as well: set on the module, they hide the class's.
    """
    held = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
    for kind in own_classes(module):
        for name, value in vars(kind).items():
            several = type(value) is tuple and all(type(item) is int for item in value)
            if (type(value) is int or several) and not name.startswith("_"):
                held.setdefault(name, value)
    for name, value in held.items():
        if not name.startswith("__"):
            yield from _integers(name, value, depth=2)


def _integers(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool | Tensor | nn.Module | types.FunctionType | types.ModuleType | type):
        return
    if isinstance(value, int):
        yield path, value
    elif depth == 0:
        return
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _integers(f"{path}.{i}", item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str) and "." not in key and not key.startswith("__"):
                yield from _integers(f"{path}.{key}", item, depth - 1)
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            if not key.startswith("__"):
                yield from _integers(f"{path}.{key}", item, depth - 1)
