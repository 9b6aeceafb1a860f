"""rebuilt(model, runs) -> tensors that the model's own code makes anew while it runs: caches and tables that grow.

Such code computes a table from a width (sin of arange, a rotary table), perhaps only for longer inputs. Were the
table cut like a weight, the code would put the first entries of a narrower one in place of those that were kept.

What code may store is read from its bytecode, from `forward` on through the methods and functions that it names.
"""

from __future__ import annotations

import dataclasses
import dis
import itertools
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from surgeon.graph.graph import Graph
from surgeon.graph.module_tree import named_modules, named_registered
from surgeon.graph.tensors import named_tensors

Line = tuple[str, int]

_ANY = ""  # the name is made when the code runs
_AHEAD = 4  # instructions in which the name of what is set follows


@dataclasses.dataclass(frozen=True)
class _Code:
    """What a function may do: attributes that it stores, with the line, and names that it uses."""

    stored: tuple[tuple[str, int], ...]
    used: frozenset[str]
    lines: range


def rebuilt(model: nn.Module, runs: Sequence[Graph]) -> dict[str, Line]:
    """name -> the line that stores it, of tensors that code which runs in `forward` may store.

    Tensors that no state dict holds count wherever they are stored. Of others (a running mean is stored anew as
    well) those count that are stored where the code decides by a value or a size, such as a longer input.
    """
    first, found = runs[0], dict[str, Line]()
    trained = {name for name, _ in named_registered(model, "_parameters")}
    if not (first.owned - trained):
        return found
    decided = {d.source for run in runs for d in run.decisions if d.source is not None and d.kind != "mode"}
    for prefix, module in named_modules(model):
        functions = _reachable(module, ["forward"])
        hanging = [f for f in functions if _decides(f, decided)]
        hanging = [*hanging, *itertools.chain.from_iterable(_named_by(f, module) for f in hanging)]
        storing = [f for f in functions if _code(f.__code__).stored]
        if not storing and not hanging:
            continue
        own = {
            name.removeprefix(f"{prefix}.") if prefix else name
            for name in first.owned
            if name.startswith(prefix)
        }
        for function, everything in (*((f, False) for f in storing), *((f, True) for f in hanging)):
            for name, line in _code(function.__code__).stored:
                for held in _meant(name, own, everything):
                    path = f"{prefix}.{held}" if prefix else held
                    if everything or path not in first.stored:
                        found.setdefault(path, (function.__code__.co_filename, line))
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    return {name: line for name, line in found.items() if name not in trained and name in names.values()}


def _meant(name: str, own: Iterable[str], everything: bool) -> list[str]:
    """The tensors of a module, or of modules below it, that a stored name may mean."""
    if name == _ANY:
        return [held for held in own if "." not in held] if everything else []
    return [held for held in own if held.rpartition(".")[2] == name]


def _decides(function: types.FunctionType, decided: Iterable[Line]) -> bool:
    code = function.__code__
    lines = _code(code).lines
    return any(path == code.co_filename and line in lines for path, line in decided)


def _reachable(module: nn.Module, names: Iterable[str]) -> list[types.FunctionType]:
    """The functions that a module's methods of these names may run, as far as names tell; none of torch's."""
    found: dict[types.FunctionType, None] = {}
    todo = list(
        itertools.chain.from_iterable(_functions(getattr(type(module), name, None)) for name in names)
    )
    while todo:
        function = todo.pop()
        if function not in found:
            found[function] = None
            todo += _named_by(function, module)
    return [function for function in found if not _of_torch(function)]


def _named_by(function: types.FunctionType, module: nn.Module) -> Iterator[types.FunctionType]:
    """Functions in the closure of one, methods of the module that it names, functions of its file that it names."""
    for cell in function.__closure__ or ():
        try:
            yield from _functions(cell.cell_contents)
        except ValueError:  # it holds nothing yet
            continue
    if _of_torch(function):
        return
    for name in _code(function.__code__).used:
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
def _code(code: types.CodeType) -> _Code:
    stored: list[tuple[str, int]] = []
    used: set[str] = set(code.co_names) | set(code.co_freevars)
    line, last = code.co_firstlineno, code.co_firstlineno
    instructions = list(dis.get_instructions(code))
    for at, instruction in enumerate(instructions):
        if instruction.starts_line is not None:
            line = int(instruction.starts_line)
            last = max(last, line)
        name = instruction.argval
        if instruction.opname == "STORE_ATTR":
            before = instructions[at - 1].argval if name == "data" else name
            stored.append((before if isinstance(before, str) else _ANY, line))
        elif name in ("register_buffer", "setattr") and instruction.opname.startswith("LOAD"):
            stored.append((_text(instructions[at + 1 : at + 1 + _AHEAD]), line))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _code(constant)
            stored += inner.stored
            used |= inner.used
            last = max(last, inner.lines.stop - 1)
    return _Code(tuple(stored), frozenset(used), range(code.co_firstlineno, last + 1))


def _text(instructions: Sequence[dis.Instruction]) -> str:
    """The name that is set, if it is written there."""
    for instruction in instructions:
        if instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            return instruction.argval
        if instruction.opname in ("FORMAT_VALUE", "BUILD_STRING", "CALL", "BINARY_OP"):
            break
    return _ANY
