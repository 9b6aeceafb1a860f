"""What can be reached from an object: first_path(root, wanted), reachable(root, into), Reach(targets)(root)."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import nn

from surgeon.graph.copying.references import children, globals_read


def first_path(root: Any, wanted: Callable[[Any], bool]) -> tuple[str, Any] | None:
    """The shortest way from an object to one that is wanted, as text, and that object; None if there is none.

    It may lead through the global names that functions read.
    """
    came: dict[int, tuple[int, str]] = {id(root): (0, "")}
    alive = [root]  # an id is only good while its object lives
    queue = deque(alive)
    while queue:
        value = queue.popleft()
        parts = children(value)
        if isinstance(value, nn.Module | types.FunctionType):
            parts += [(f" (which reads the global '{name}')", item) for name, item in globals_read(value)]
        for label, child in parts:
            if id(child) in came:
                continue
            came[id(child)] = id(value), label
            if wanted(child):
                return _spelled(came, id(child)), child
            alive.append(child)
            queue.append(child)
    return None


def reachable(root: Any, into: Callable[[Any], bool]) -> dict[int, Any]:
    """All objects below one, by id; those that `into` refuses are in it, but not what they hold."""
    found = {id(root): root}
    stack = [root]
    while stack:
        value = stack.pop()
        if not into(value):
            continue
        for _, child in children(value):
            if id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return found


class Reach:
    """Whether one of some objects can be reached from another; what was found out is remembered."""

    def __init__(self, targets: set[int]) -> None:
        self.targets = targets  # ids
        self._apart: dict[int, Any] = {}  # objects from which none can be reached

    def __call__(self, value: Any) -> bool:
        if id(value) in self.targets:
            return True
        seen = {id(value): value}
        stack = [value]
        while stack:
            for _, child in children(stack.pop()):
                if id(child) in self.targets:
                    return True
                if id(child) not in seen and id(child) not in self._apart:
                    seen[id(child)] = child
                    stack.append(child)
        self._apart |= seen
        return False


def _spelled(came: dict[int, tuple[int, str]], key: int) -> str:
    labels = []
    while came[key][1]:
        key, label = came[key]
        labels.append(label)
    return "".join(reversed(labels)).removeprefix(".")
