"""Numbers in the source of a module's own methods: to look for one, and to change it.

A method is compiled anew from its source with one number changed; all else stays as the user wrote it: comments, loops,
decisions, both modes, what `super()` and closures mean, annotations, decorators.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import linecache
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from surgeon._running import CHANGED, TRACED


def methods(module: nn.Module) -> dict[str, Any]:
    """The methods and properties that the module's own classes define, by name; those of torch's classes are left out."""
    found: dict[str, Any] = {}
    for kind in own_classes(module):
        for name, value in vars(kind).items():
            if not name.startswith("__") and _function(value) is not None:
                found.setdefault(name, value)
    return found


def own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that are not torch's."""
    return [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins")]


def names_used(method: Any) -> set[str]:
    """Names of the attributes and globals that a method's code uses."""
    function = _function(method)
    return set() if function is None else set(function.__code__.co_names)


def parsed(method: Any) -> ast.FunctionDef | None:
    """A method's source as a tree; None if it has none of its own."""
    function = _function(method)
    found = None if function is None else _source(function)
    return None if found is None else found.parsed


def numbers(method: Any) -> Iterator[tuple[int, tuple[str, int], int]]:
    """Whole numbers in a method, defaults included, as they stand: (which it is, its file and line, the number)."""
    function = _function(method)
    found = None if function is None else _source(function)
    if function is not None and found is not None:
        code = function.__code__
        for which, node in enumerate(found.numbers):
            yield which, (code.co_filename, code.co_firstlineno + node.lineno - 2), int(found.text(node), 0)


def changed(method: Any, which: int, old: int, new: int) -> Any:
    """The method with one of its `numbers` changed.

    Raises:
        ValueError: there is no such number, or no source.
    """
    function = _function(method)
    found = None if function is None else _source(function)
    if function is None or found is None:
        raise ValueError(f"the source of {getattr(method, '__qualname__', method)} cannot be read")
    if which >= len(found.numbers) or int(found.text(found.numbers[which]), 0) not in (old, new):
        raise ValueError(f"it is not number {which} of {function.__qualname__}")
    return _around(method, _compiled(function, found, found.numbers[which], new))


# -- functions and what is around them ------------------------------------------------------------------------------


def _function(method: Any) -> types.FunctionType | None:
    """What the user wrote, of a method that a class holds: inside of decorators that tell (`functools.wraps`)."""
    inner = _inside(method)
    if inner is not None:
        return _function(inner)
    return method if isinstance(method, types.FunctionType) else None


def _inside(method: Any) -> Any:
    if isinstance(method, staticmethod | classmethod):
        return method.__func__
    if isinstance(method, property):
        return method.fget
    inner = getattr(method, "__wrapped__", None) if isinstance(method, types.FunctionType) else None
    return inner if inner is not None and any(cell.cell_contents is inner for cell in _filled(method)) else None


def _filled(function: types.FunctionType) -> list[types.CellType]:
    """The cells of its closure that hold anything."""
    held = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it holds nothing yet
            cell.cell_contents  # noqa: B018  # it raises
            held.append(cell)
    return held


def _around(method: Any, new: types.FunctionType) -> Any:
    """The same method with another function inside."""
    inner = _inside(method)
    if inner is None:
        return new
    made = _around(inner, new)
    if isinstance(method, staticmethod | classmethod):
        return type(method)(made)
    if isinstance(method, property):
        return property(made, method.fset, method.fdel, method.__doc__)
    filled = [cell for cell in _filled(method) if cell.cell_contents is inner]
    cells = [types.CellType(made) if cell in filled else cell for cell in method.__closure__]
    wrapper = _like(method, method.__code__, tuple(cells))
    wrapper.__dict__["__wrapped__"] = made
    return wrapper


def _like(function: types.FunctionType, code: types.CodeType, cells: tuple[types.CellType, ...]) -> types.FunctionType:
    """A function with other code or another closure."""
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


# -- source -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A method's lines as they stand in its file, and the same parsed (from below a line that is put before them)."""

    lines: list[bytes]
    margin: str
    parsed: ast.FunctionDef

    @property
    def numbers(self) -> list[ast.Constant]:
        defaults = (*self.parsed.args.defaults, *self.parsed.args.kw_defaults)
        nodes = itertools.chain((node for node in defaults if node is not None), *map(ast.walk, self.parsed.body))
        found = [node for node in nodes if isinstance(node, ast.Constant) and type(node.value) is int and self._is_there(node)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def _is_there(self, node: ast.Constant) -> bool:
        """Whether the number is where the parser says; of one in an f-string some versions of Python do not know."""
        with contextlib.suppress(ValueError):
            return node.lineno == node.end_lineno and int(self.text(node), 0) == node.value
        return False

    def text(self, node: ast.Constant) -> str:
        return self.lines[node.lineno - 2][node.col_offset : node.end_col_offset].decode()

    def with_number(self, node: ast.Constant, new: int) -> str:
        lines, at = list(self.lines), node.lineno - 2
        lines[at] = lines[at][: node.col_offset] + str(new).encode() + lines[at][node.end_col_offset :]
        return b"".join(lines).decode()


def _source(function: types.FunctionType) -> _Source | None:
    if function.__code__.co_filename.startswith(TRACED):
        return None
    try:
        text = inspect.getsource(function)
        margin = text[: len(text) - len(text.lstrip())]
        tree = ast.parse(f"{'if True:' if margin else ''}\n{text}").body
    except (OSError, SyntaxError, TypeError):
        return None
    found = tree[0].body[0] if margin and isinstance(tree[0], ast.If) else tree[0]
    if not isinstance(found, ast.FunctionDef) or found.name != function.__name__:
        return None
    return _Source(text.encode().splitlines(keepends=True), margin, found)


def _compiled(function: types.FunctionType, source: _Source, number: ast.Constant, new: int) -> types.FunctionType:
    """The function from its source with another number."""
    names = function.__code__.co_freevars
    text = source.with_number(number, new)
    if source.margin:  # closures and super() are what they were where the method stands in a function of the same names
        text = f"def _outer({', '.join(names)}):\n{text}\n{source.margin}return {function.__name__}\n"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            _bare(node)
            break
    file = f"{CHANGED}{next(_files)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    flags = annotations.compiler_flag  # they are taken from the function, too
    code = compile(ast.fix_missing_locations(tree), file, "exec", flags=flags, dont_inherit=True)
    space: dict[str, types.FunctionType] = {}
    exec(code, function.__globals__, space)  # the user's own code with another number
    inner = (space["_outer"](*names) if source.margin else space[function.__name__]).__code__
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    made = _like(function, inner, tuple(cells[name] for name in inner.co_freevars))
    arguments = source.parsed.args
    if number in arguments.defaults:
        made.__defaults__ = tuple(_with(number, new, arguments.defaults, function.__defaults__ or ()))
    if number in arguments.kw_defaults:
        known = function.__kwdefaults__ or {}
        values = _with(number, new, arguments.kw_defaults, [known.get(arg.arg) for arg in arguments.kwonlyargs])
        made.__kwdefaults__ = {
            arg.arg: value for arg, value in zip(arguments.kwonlyargs, values, strict=True) if arg.arg in known
        }
    return made


_files = itertools.count()


def _bare(method: ast.FunctionDef) -> None:
    """Decorators are around the function already, and what its defaults are computed of may be gone."""
    method.decorator_list = []
    method.args.defaults = [ast.Constant(None) for _ in method.args.defaults]
    method.args.kw_defaults = [None if default is None else ast.Constant(None) for default in method.args.kw_defaults]


def _with(number: ast.Constant, new: int, nodes: Any, values: Any) -> list[Any]:
    return [new if node is number else value for node, value in zip(nodes, values, strict=True)]
