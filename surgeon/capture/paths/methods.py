"""The code that a module's methods may run, and what it may do, read from bytecode: names, attributes that it stores."""

from __future__ import annotations

import dataclasses
import dis
import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

ANY = ""  # the name of what is stored is made when the code runs
_AHEAD = 4  # instructions in which the name of what is set follows


@dataclasses.dataclass(frozen=True)
class Code:
    """What a function may do: attributes that it stores, with the line, and names that it uses."""

    stored: tuple[tuple[str, int], ...]
    used: frozenset[str]
    lines: range


def reachable(module: nn.Module, names: Iterable[str]) -> list[types.FunctionType]:
    """The functions that a module's methods of these names may run, as far as names tell; none of torch's."""
    found: dict[types.FunctionType, None] = {}
    todo = list(
        itertools.chain.from_iterable(_functions(getattr(type(module), name, None)) for name in names)
    )
    while todo:
        function = todo.pop()
        if function not in found:
            found[function] = None
            todo += named_by(function, module)
    return [function for function in found if not _of_torch(function)]


def named_by(function: types.FunctionType, module: nn.Module) -> Iterator[types.FunctionType]:
    """Functions in the closure of one, methods of the module that it names, functions of its file that it names."""
    for cell in function.__closure__ or ():
        try:
            yield from _functions(cell.cell_contents)
        except ValueError:  # it holds nothing yet
            continue
    if _of_torch(function):
        return
    for name in facts(function.__code__).used:
        if not name.startswith("__"):
            yield from _functions(getattr(type(module), name, None))
        known = function.__globals__.get(name)
        if isinstance(known, types.FunctionType) and not _of_torch(known):
            yield known


def _functions(value: Any) -> Iterator[types.FunctionType]:
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield value


def _of_torch(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


@lru_cache(maxsize=4096)
def facts(code: types.CodeType) -> Code:
    stored: list[tuple[str, int]] = []
    used: set[str] = set(code.co_names) | set(code.co_freevars)
    used |= {
        text for text in code.co_consts if isinstance(text, str) and text.isidentifier()
    }  # for `getattr`
    line, last = code.co_firstlineno, code.co_firstlineno
    instructions = list(dis.get_instructions(code))
    for at, instruction in enumerate(instructions):
        if instruction.starts_line is not None:
            line = int(instruction.starts_line)
            last = max(last, line)
        name = instruction.argval
        if instruction.opname == "STORE_ATTR":
            before = instructions[at - 1].argval if name == "data" else name
            stored.append((before if isinstance(before, str) else ANY, line))
        elif name in ("register_buffer", "setattr") and instruction.opname.startswith("LOAD"):
            stored.append((_text(instructions[at + 1 : at + 1 + _AHEAD]), line))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = facts(constant)
            stored += inner.stored
            used |= inner.used
            last = max(last, inner.lines.stop - 1)
    return Code(tuple(stored), frozenset(used), range(code.co_firstlineno, last + 1))


def _text(instructions: Sequence[dis.Instruction]) -> str:
    """The name that is set, if it is written there."""
    for instruction in instructions:
        if instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            return instruction.argval
        if instruction.opname in ("FORMAT_VALUE", "BUILD_STRING", "CALL", "BINARY_OP"):
            break
    return ANY
