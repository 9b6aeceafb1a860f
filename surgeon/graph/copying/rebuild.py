"""rebuilt(value, memo, part) -> a copy of an object by the protocol that its class has for it."""

from __future__ import annotations

import builtins
import copy
import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from surgeon.errors import CopyError
from surgeon.graph.tensors import named_tensors


class Globals(dict[str, Any]):
    """The globals of a function that was bound to a copy: a few names of its own before those of its file."""

    def __init__(self, of_the_file: dict[str, Any]) -> None:
        super().__init__({"__builtins__": of_the_file.get("__builtins__", builtins)})
        self._of_the_file = of_the_file

    def __missing__(self, name: str) -> Any:
        return self._of_the_file[name]


def bound(way: str, part: str) -> CopyError:
    return CopyError(
        "the small model would hold a part of the original",
        where=way,
        why=f"it leads to the original's {part or 'model itself'}, and cannot be bound to the copy",
        fix="set it to None (remove the hook) before the cut, and set it anew on the small model",
    )


class CannotCopyError(Exception):
    """An object, the only argument, has no way to be copied."""


def rebuilt(value: Any, memo: dict[int, Any], know: Callable[[Any], Any], part: Callable[[Any], Any]) -> Any:
    """A copy of an object as `copy.deepcopy` makes it.

    Args:
        memo: what took the place of what, by id; handed to a `__deepcopy__` of the object's class.
        know: told of the copy before what it holds is copied.
        part: copies what the object holds.

    Raises:
        CannotCopyError: the object's class has no protocol, or it fails.
    """
    kind = type(value)
    own = getattr(kind, "__deepcopy__", None)
    if own is not None:
        return know(_asked(value, lambda: own(value, memo)))
    reduce = copyreg.dispatch_table.get(kind)
    parts = _asked(value, lambda: reduce(value) if reduce else value.__reduce_ex__(4))
    if isinstance(parts, str):  # a global name
        return know(value)
    make, args, state, items, pairs, setter = (*parts, None, None, None, None)[:6]
    given = [part(arg) for arg in args]
    new = know(_asked(value, lambda: make(*given)))
    if state is not None:
        _set_state(new, part(state), setter)
    if items is not None:
        new.extend(part(item) for item in items)
    for key, item in pairs or ():
        new[part(key)] = part(item)
    return new


def _asked(value: Any, protocol: Callable[[], Any]) -> Any:
    try:
        return protocol()
    except Exception as error:  # classes say in many ways that they cannot be copied
        raise CannotCopyError(value) from error


def _set_state(new: Any, state: Any, setter: Callable[[Any, Any], None] | None) -> None:
    if setter is not None:
        setter(new, state)
    elif hasattr(new, "__setstate__"):
        new.__setstate__(state)
    else:
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if attributes:
            new.__dict__.update(attributes)
        for name, item in (slots or {}).items():
            setattr(new, name, item)


def scripted(module: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """A copy of a TorchScript module. TorchScript's own copies know of no memo: the tensors are set afterwards."""
    new = copy.deepcopy(module)
    for name, tensor in named_tensors(module):
        *path, attribute = name.split(".")
        setattr(functools.reduce(getattr, path, new), attribute, memo[id(tensor)])
    return new
