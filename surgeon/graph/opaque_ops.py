"""Ops that are recorded whole, because no schema of torch's says what they compute: operators that take functions, and
ops that write to their arguments without a form that returns what they write.

Both stand in a graph like any `OpOverload`: they can be called, and have a schema with a name. No rule knows them, so
what they touch is frozen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator


@dataclasses.dataclass(frozen=True)
class _Schema:
    name: str
    arguments: tuple[Any, ...] = ()
    returns: tuple[Any, ...] = ()


class HigherOrder:
    """An operator that takes functions, such as `flex_attention` or `scan`; it runs whole.

    In a graph it has one more argument, `held`: the tensors that its functions hold, which it reads as well.
    """

    tags = ()
    _overloadname = "default"

    def __init__(self, operator: HigherOrderOperator) -> None:
        self.operator = operator
        self._schema = _Schema(f"higher_order::{operator.__name__}")
        self.__name__ = operator.__name__

    def __call__(self, *args: Any, held: Any = (), **kwargs: Any) -> Any:
        return self.operator(*args, **kwargs)


class Written:
    """An op that writes to some arguments, as one that leaves them alone: gives its outputs and what it wrote."""

    tags = ()
    _overloadname = "default"

    def __init__(self, op: Any, places: tuple[tuple[int, str], ...]) -> None:
        self.op, self.places, self._schema = op, places, op._schema
        self.__name__ = str(op._schema.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, named = list(args), dict(kwargs)
        targets = []
        for place, name in self.places:
            held: Any = given if place < len(given) else named
            key: Any = place if place < len(given) else name
            held[key] = held[key].clone()
            targets.append(held[key])
        out = self.op(*given, **named)
        outputs = out if isinstance(out, list | tuple) else () if out is None else (out,)
        return [*outputs, *targets]


@cache
def as_op(func: Any) -> Any:
    """What stands for an op in a graph: itself, if it has a schema."""
    return HigherOrder(func) if isinstance(func, HigherOrderOperator) else func


@cache
def as_written(op: Any, places: tuple[tuple[int, str], ...]) -> Written:
    """The op as one that returns what it writes to these arguments (place, name)."""
    return Written(op, places)


def held_by_functions(args: Any) -> list[Tensor]:
    """The tensors that functions among the arguments hold: in closures, defaults, and modules that they name parts of."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    todo = list(args)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, nn.Module):
            todo += itertools.chain(item.parameters(), item.buffers())
        elif isinstance(item, list | tuple):
            todo += item
        elif isinstance(item, functools.partial):
            todo += (item.func, *item.args, *item.keywords.values())
        elif isinstance(item, types.MethodType):
            todo += _read_by(item.__func__, [item.__self__])
        elif isinstance(item, types.FunctionType):
            todo += _read_by(item, [])
    given = {id(item) for item in _tensors(args)}
    return [tensor for key, tensor in found.items() if key not in given]


def _read_by(function: Any, more: list[Any]) -> Iterator[Any]:
    """What a function holds; of modules, the attributes that its code names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    for item in (*more, *(function.__defaults__ or ()), *cells):
        if isinstance(item, nn.Module):
            yield from (getattr(item, name) for name in _names(function.__code__) if hasattr(item, name))
        else:
            yield item


def _names(code: types.CodeType) -> frozenset[str]:
    """The names that a function's code uses, functions inside it included."""
    inner = (_names(item) for item in code.co_consts if isinstance(item, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _tensors(args: Any) -> Iterator[Tensor]:
    for item in args:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)
