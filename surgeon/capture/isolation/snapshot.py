"""snapshots(model) -> functions that put back what the model's modules hold now: attributes, containers, objects."""

from __future__ import annotations

import functools
import operator
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.graph.copying.references import ATOMIC, is_atomic, is_weak

_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_DICTS = frozenset((dict, OrderedDict, defaultdict))
_LEFT = ATOMIC | {Tensor, nn.Parameter}


def snapshots(model: nn.Module) -> list[Callable[[], None]]:
    """For everything that can change below a model, but the numbers in tensors: what puts it back as it is now.

    Objects that hold locks (queues, pools) belong to the process and are left alone, and so is what only functions
    and weak references lead to: it is the caller's.
    """
    empty: list[dict[Any, Any]] = []  # most of what a module holds
    found: list[Callable[[], None]] = [functools.partial(_put_back_empty, empty)]
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _LEFT or id(value) in seen:
            continue
        if kind in _DICTS and not value:
            empty.append(value)
            continue
        if is_atomic(value) or isinstance(value, Tensor) or is_weak(value):
            continue
        seen.add(id(value))
        stack.extend(_looked_at(value, found))
    return found


def _looked_at(value: Any, found: list[Callable[[], None]]) -> Iterable[Any]:
    """Note how to put a value back; what it holds comes next."""
    kind = type(value)
    inside: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        inside = value.__dict__.values()
        found.append(functools.partial(_put_back_dict, value.__dict__, value.__dict__.copy()))
    elif kind in _DICTS:
        inside = value.values()
        found.append(functools.partial(_put_back_dict, value, value.copy()))
    elif kind in (list, deque):
        inside = value
        found.append(functools.partial(_put_back_list, value, list(value)))
    elif kind is set:
        found.append(functools.partial(_put_back_set, value, value.copy()))
    elif kind is tuple:
        inside = value
    elif isinstance(value, np.ndarray):
        found.append(functools.partial(np.copyto, value, value.copy()))
    elif isinstance(value, torch.Generator):
        found.append(functools.partial(_put_back_state, value, value.get_state()))
    elif not callable(value):
        held = getattr(value, "__dict__", None)
        if type(held) is dict and not any(isinstance(item, _LOCKS) for item in held.values()):
            inside = held.values()
            found.append(functools.partial(_put_back_dict, held, held.copy()))
    return inside


def _put_back_state(generator: torch.Generator, before: Tensor) -> None:
    generator.set_state(before)


def _put_back_empty(every: list[dict[Any, Any]]) -> None:
    for held in every:
        if held:
            held.clear()


def _put_back_dict(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(held) == len(before) and all(map(operator.is_, held.values(), before.values())):
        same = all(map(operator.is_, held, before))
    else:
        same = False
    if not same:
        held.clear()
        held.update(before)


def _put_back_list(held: Any, before: list[Any]) -> None:
    if len(held) != len(before) or any(a is not b for a, b in zip(held, before, strict=True)):
        held.clear()
        held.extend(before)


def _put_back_set(held: set[Any], before: set[Any]) -> None:
    if held != before:
        held.clear()
        held.update(before)
