"""Numbers in the source of a module's own methods: to look for one, and to change it.

A method is compiled anew from its source with one number changed; all else stays as the user wrote it: comments, loops,
decisions, both modes, what `super()` and closures mean, annotations.
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

from torch import nn

from surgeon._running import CHANGED, TRACED


def methods(module: nn.Module) -> dict[str, types.FunctionType]:
    """The methods that the module's own classes define, by name; those of torch's classes are left out."""
    found: dict[str, types.FunctionType] = {}
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                found.setdefault(name, value)
    return found


def numbers(function: types.FunctionType) -> Iterator[tuple[int, int, int]]:
    """Whole numbers in a method's body: (which it is, the line in its file, the number); none without a source of its own.

    A decorator may make anything of a method, so one that has some is left alone.
    """
    found = _source(function)
    if found is not None:
        first = function.__code__.co_firstlineno
        for which, node in enumerate(found.numbers):
            yield which, first + node.lineno - found.parsed.lineno, int(found.text(node), 0)


def changed(function: types.FunctionType, which: int, old: int, new: int) -> types.FunctionType:
    """The method with one of its `numbers` changed.

    Raises:
        ValueError: there is no such number, or no source.
    """
    found = _source(function)
    if found is None:
        raise ValueError(f"the source of {function.__qualname__} cannot be read")
    if which >= len(found.numbers) or int(found.text(found.numbers[which]), 0) not in (old, new):
        raise ValueError(f"it is not number {which} of {function.__qualname__}")
    names = function.__code__.co_freevars
    text = found.with_number(found.numbers[which], new)
    if found.margin:  # closures and super() are what they were where the method stands in a function of the same names
        text = f"def _outer({', '.join(names)}):\n{text}\n{found.margin}return {function.__name__}\n"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            _without_defaults(node.args)
            break
    file = f"{CHANGED}{next(_files)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    flags = annotations.compiler_flag  # they are taken from the function, too
    code = compile(ast.fix_missing_locations(tree), file, "exec", flags=flags, dont_inherit=True)
    space: dict[str, types.FunctionType] = {}
    exec(code, function.__globals__, space)  # the user's own code with another number
    inner = (space["_outer"](*names) if found.margin else space[function.__name__]).__code__
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    made = types.FunctionType(
        inner, function.__globals__, function.__name__, function.__defaults__, tuple(cells[name] for name in inner.co_freevars)
    )
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    return made


_files = itertools.count()


def _without_defaults(arguments: ast.arguments) -> None:
    """They are taken from the function: what they are computed of may be gone."""
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else ast.Constant(None) for default in arguments.kw_defaults]


@dataclasses.dataclass(frozen=True)
class _Source:
    """A method's lines as they stand in its file, and the same parsed (from below a line that is put before them)."""

    lines: list[bytes]
    margin: str
    parsed: ast.FunctionDef

    @property
    def numbers(self) -> list[ast.Constant]:
        nodes = (node for statement in self.parsed.body for node in ast.walk(statement))
        return [node for node in nodes if isinstance(node, ast.Constant) and type(node.value) is int and self._is_there(node)]

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
    if not isinstance(found, ast.FunctionDef) or found.decorator_list or found.name != function.__name__:
        return None
    return _Source(text.encode().splitlines(keepends=True), margin, found)
