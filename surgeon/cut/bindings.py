"""check_bindings(model, small): nothing that the small model reaches is a part of the original.

A copy takes modules, tensors and plain data along. Functions are not copied: a hook or a forward that was put
in place of the class's keeps what it holds in its closure, and would run or change the original.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import MendError
from surgeon.graph.tensors import named_tensors

_PLAIN = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)


def check_bindings(model: nn.Module, small: nn.Module) -> None:
    """Refuse a small model that still reads parts of the original.

    Raises:
        MendError: something that it holds (the closure of a hook, say) is a module or a tensor of the original.
    """
    parts: dict[int, str] = {id(module): path or "the model" for path, module in model.named_modules()}
    memory: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        parts[id(tensor)] = name
        if not tensor.is_meta and tensor.layout is torch.strided and tensor.numel():
            memory[tensor.untyped_storage().data_ptr()] = name
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", small)]
    while todo:
        path, item = todo.pop()
        if isinstance(item, _PLAIN) or id(item) in seen:
            continue
        seen.add(id(item))
        shared = parts.get(id(item)) or _memory_of(item, memory)
        if shared is not None:
            raise MendError(
                f"the small model would still use '{shared}' of the original",
                where=path,
                why="functions are not copied: what a closure, a bound method or a hook holds stays the original's",
                fix="take it off before the cut and set it again on the small model, or reach the layer through self",
            )
        todo += [(f"{path}{step}", inner) for step, inner in _held(item)]


def _memory_of(item: Any, memory: dict[int, str]) -> str | None:
    """The tensor of the original in whose memory a tensor lies."""
    if not isinstance(item, Tensor) or item.is_meta or item.layout is not torch.strided or not item.numel():
        return None
    return memory.get(item.untyped_storage().data_ptr())


def _held(item: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with how it is reached."""
    if isinstance(item, dict):
        yield from ((f"[{key!r}]", value) for key, value in [*item.items()])
    elif isinstance(item, list | tuple | set | frozenset):
        yield from ((f"[{at}]", value) for at, value in enumerate(item))
    elif isinstance(item, types.MethodType):
        yield from ((".__self__", item.__self__), (".__func__", item.__func__))
    elif isinstance(item, functools.partial):
        yield from ((".func", item.func), (".args", item.args), (".keywords", item.keywords))
    elif isinstance(item, weakref.ref):
        yield "()", item()
    elif isinstance(item, types.FunctionType):
        for name, cell in zip(item.__code__.co_freevars, item.__closure__ or (), strict=True):
            yield f".<{name}>", _contents(cell)
        yield ".__defaults__", item.__defaults__
        yield ".__kwdefaults__", item.__kwdefaults__
    if not isinstance(item, type):
        yield from ((f".{name}", value) for name, value in [*getattr(item, "__dict__", {}).items()])


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it holds nothing yet
        return None
