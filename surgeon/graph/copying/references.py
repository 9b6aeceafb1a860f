"""children(value): what a Python object holds.

A walk over them goes through attributes, containers, closures, hooks, partials, bound methods, weak references, running
generators and iterators. It does not go into classes and Python modules: they belong to the process.
"""

from __future__ import annotations

import dis
import enum
import functools
import gc
import re
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

ATOMIC = frozenset(
    {
        int, float, bool, str, bytes, complex, type(None), type(Ellipsis), type(NotImplemented), range, slice, re.Pattern,
        types.CodeType, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, np.dtype,
    }
)  # fmt: skip
_OF_THE_PROCESS = (
    type,
    types.ModuleType,
    enum.Enum,
    fx.Graph,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_WALKED = (nn.Module, Tensor, dict, list, tuple, set, types.MethodType, functools.partial)

Child = tuple[str, Any]


def is_atomic(value: Any) -> bool:
    """Whether an object holds nothing of a model: numbers, texts, classes, Python modules."""
    kind = type(value)
    return kind in ATOMIC or (kind not in _PROXIES and isinstance(value, _OF_THE_PROCESS))


def children(value: Any) -> list[Child]:
    """What an object holds, each with a label for messages; atoms are left out."""
    return [
        (label, child) for label, child in _held(value) if type(child) not in ATOMIC and not is_atomic(child)
    ]


def globals_read(value: Any) -> Iterator[Child]:
    """What may hold a model among the global names that a function, or a module's forward, reads, by name."""
    function = getattr(type(value), "forward", None) if isinstance(value, nn.Module) else value
    if not isinstance(function, types.FunctionType) or (function.__module__ or "").startswith("torch."):
        return
    for name in _global_names(function.__code__):
        found = function.__globals__.get(name)
        closed = isinstance(found, types.FunctionType) and bool(found.__closure__)
        if type(found) not in ATOMIC and (closed or isinstance(found, _WALKED)):
            yield name, found


def sets_globals(function: types.FunctionType) -> bool:
    """Whether a function's code gives global names other values."""
    return any(i.opname == "STORE_GLOBAL" for i in dis.get_instructions(function.__code__))


def attributes_held(value: Any) -> list[Child]:
    """The entries of an object's `__dict__` and of its slots."""
    held = getattr(value, "__dict__", None)
    own = list(held.items()) if isinstance(held, dict) else []
    return own + slots_held(value)


def slots_held(value: Any) -> list[Child]:
    """The entries of an object's slots, by the names under which they can be set."""
    found = []
    for name in _slots_of(type(value)):  # type: ignore[arg-type]
        try:
            found.append((name, getattr(value, name)))
        except AttributeError:  # it was never set
            continue
    return found


@functools.lru_cache(maxsize=4096)
def _slots_of(cls: Any) -> tuple[str, ...]:
    """The names under which the slots of a class and of those that it builds on can be set."""
    found = []
    for kind in cls.__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            if name not in ("__dict__", "__weakref__"):
                found.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
    return tuple(found)


def referent(value: Any) -> Any:
    """What a weak reference or proxy points at; None if that is gone."""
    if isinstance(value, weakref.ReferenceType):
        return value()
    try:
        return value.__repr__.__self__
    except ReferenceError:
        return None


def is_weak(value: Any) -> bool:
    """Whether an object is a weak reference or a proxy of one."""
    return type(value) in _PROXIES or isinstance(value, weakref.ReferenceType)


# -- kinds of objects ----------------------------------------------------------------------------------------


def _held(value: Any) -> Iterable[Child]:
    if is_weak(value):
        return [(" (weak reference)", referent(value))]
    for kinds, held in _KINDS:
        if isinstance(value, kinds):
            return held(value)
    return _of_object(value)


def _of_module(module: nn.Module) -> list[Child]:
    found: list[Child] = []
    for name, value in attributes_held(module):
        if name in ("_parameters", "_buffers", "_modules") and type(value) is dict:
            found += [(f".{key}", item) for key, item in value.items()]
        elif name not in _OF_TORCH or value:  # most of its own dicts of hooks are empty
            found.append((f".{name}", value))
    return found


def _of_tensor(tensor: Tensor) -> list[Child]:
    own = [(f".{name}", value) for name, value in vars(tensor).items()]
    return [*own, (".grad", tensor.grad)] if tensor.is_leaf else own


def _of_dict(value: dict[Any, Any]) -> Iterator[Child]:
    for key, item in list(value.items()):
        yield f"[key {key!r:.40}]" if not isinstance(key, str | int) else "", key
        yield f"[{key!r:.40}]", item
    yield from ((f".{name}", item) for name, item in attributes_held(value))


def _of_sequence(value: Any) -> Iterator[Child]:
    yield from ((f"[{place}]", item) for place, item in enumerate(list(value)))
    yield from ((f".{name}", item) for name, item in attributes_held(value))


def _of_function(function: types.FunctionType) -> Iterator[Child]:
    yield from ((f", {label}", item) for label, item in closure_of(function))
    yield from ((f", default {place}", item) for place, item in enumerate(function.__defaults__ or ()))
    yield from ((f", default {name}", item) for name, item in (function.__kwdefaults__ or {}).items())
    yield from ((f".{name}", item) for name, item in function.__dict__.items())


def closure_of(function: types.FunctionType) -> Iterator[Child]:
    """The filled cells of a function's closure: (label, what they hold)."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable '{name}' of function {function.__qualname__}", cell.cell_contents
        except ValueError:  # it holds nothing yet
            continue


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return tuple(dict.fromkeys(names))


def _of_method(method: Any) -> Iterator[Child]:
    yield f" (method {method.__name__} of a {type(method.__self__).__name__})", method.__self__
    if isinstance(method, types.MethodType):
        yield "", method.__func__


def _of_partial(value: functools.partial[Any]) -> Iterator[Child]:
    yield " (partial)", value.func
    yield from ((f" (partial, argument {place})", item) for place, item in enumerate(value.args))
    yield from ((f" (partial, argument {name})", item) for name, item in value.keywords.items())
    yield from attributes_held(value)


def _of_generator(value: Any) -> Iterator[Child]:
    frame = (
        getattr(value, "gi_frame", None)
        or getattr(value, "cr_frame", None)
        or getattr(value, "ag_frame", None)
    )
    if frame is not None:
        yield from ((f", variable '{name}'", item) for name, item in frame.f_locals.items())


def _of_object(value: Any) -> Iterator[Child]:
    yield from ((f".{name}", item) for name, item in attributes_held(value))
    if not type(value).__flags__ & _HEAP_TYPE:  # a type of C: what it holds, garbage collection knows
        held = getattr(value, "__dict__", None)
        yield from (
            (f" ({type(value).__name__})", item) for item in gc.get_referents(value) if item is not held
        )


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_OF_TORCH = frozenset(vars(nn.Module()))
_KINDS: tuple[tuple[Any, Callable[[Any], Iterable[Child]]], ...] = (
    (nn.Module, _of_module),
    (Tensor, _of_tensor),
    (dict, _of_dict),
    ((list, tuple, set, frozenset, deque), _of_sequence),
    (types.FunctionType, _of_function),
    ((types.MethodType, types.BuiltinMethodType, types.MethodWrapperType), _of_method),
    (functools.partial, _of_partial),
    (types.CellType, lambda cell: iter([("", cell.cell_contents)] if _is_filled(cell) else [])),
    ((types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType), _of_generator),
    (np.ndarray, lambda array: _of_sequence(array.ravel()) if array.dtype == object else iter(())),
)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # it raises
    except ValueError:
        return False
    return True
