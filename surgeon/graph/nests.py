"""map_tensors(tree, function): a nest of containers and objects with other tensors in it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from surgeon.errors import InputError


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with `function(tensor)` in place of each tensor, once for a tensor that is there several times.

    Containers and objects that hold tensors are copied, all else stays.

    Raises:
        InputError: an object that holds tensors cannot be copied.
    """
    return _Mapped(function)(tree)


class _Mapped:
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.known: dict[int, tuple[Any, Any]] = {}  # what was met (and stays alive), what it became

    def __call__(self, item: Any) -> Any:
        if item is None or isinstance(
            item, str | bytes | int | float | complex | type | ModuleType | nn.Module
        ):
            return item
        if id(item) not in self.known:
            self.known[id(item)] = item, item  # for nests that hold themselves
            self.known[id(item)] = item, self._made(item)
        return self.known[id(item)][1]

    def _made(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.function(item)
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*map(self, item))
        if type(item) in (list, tuple, set, frozenset, deque):
            return type(item)(map(self, item))
        if type(item) is dict:
            return {key: self(value) for key, value in item.items()}
        if isinstance(item, Mapping) and hasattr(item, "__setitem__"):
            return self._copied(
                item, {key: self(value) for key, value in item.items()}, type(item).__setitem__
            )
        return self._copied(
            item, {key: self(value) for key, value in attributes(item).items()}, object.__setattr__
        )

    def _copied(self, item: Any, values: Mapping[Any, Any], put: Callable[[Any, Any, Any], None]) -> Any:
        """A copy of an object that holds these values, the object itself if they are those that it holds."""
        own = item if isinstance(item, Mapping) else attributes(item)
        changed = {key: value for key, value in values.items() if value is not own[key]}
        if not changed:
            return item
        try:
            made = copy.copy(item)
        except Exception as error:  # an object of the user's: copying it may run any code
            raise InputError(
                f"an object among the inputs holds tensors and cannot be copied: {type(error).__name__}: {error}",
                where=type(item).__qualname__,
                fix="pass the tensors themselves, or objects that copy.copy can copy",
            ) from error
        for key, value in changed.items():
            put(made, key, value)
        return made


def attributes(item: Any) -> dict[str, Any]:
    """What an object holds by name, slots included."""
    slots = [name for kind in type(item).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    held = {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return {**held, **getattr(item, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))
