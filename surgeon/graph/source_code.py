"""The source of a module's own methods: which there are, what they name, the numbers in them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

CHANGED = "<surgeon source "  # begins the names of the files of methods in which a number was changed
TRACED = ("<surgeon forward ", "<eval_with_key>")  # of what torch.fx made of a forward


def methods(module: nn.Module) -> dict[str, Any]:
    """The methods and properties that the module's own classes define, by name; those of torch's classes are
    left out.
    """
    found: dict[str, Any] = {}
    for kind in own_classes(module):
        for name, value in vars(kind).items():
            if not name.startswith("__") and _function(value) is not None:
                found.setdefault(name, value)
    return found


def own_classes(module: nn.Module) -> list[type]:
    """The classes of a module that are not torch's."""
    return [
        kind
        for kind in type(module).__mro__
        if kind.__module__.partition(".")[0] not in ("torch", "builtins")
    ]


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
    """Whole numbers in a method, defaults included, as they stand: (which it is, its file and line, the
    number).
    """
    function = _function(method)
    found = None if function is None else _source(function)
    if function is not None and found is not None:
        code = function.__code__
        for which, node in enumerate(found.numbers):
            yield which, (code.co_filename, code.co_firstlineno + node.lineno - 2), int(found.text(node), 0)


# -- functions and what is around them -----------------------------------------------------------------------


def _function(method: Any) -> types.FunctionType | None:
    """What the user wrote, of a method that a class holds: inside of decorators that tell
    (`functools.wraps`).
    """
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
    return (
        inner if inner is not None and any(cell.cell_contents is inner for cell in _filled(method)) else None
    )


def _filled(function: types.FunctionType) -> list[types.CellType]:
    """The cells of its closure that hold anything."""
    held = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it holds nothing yet
            cell.cell_contents  # noqa: B018  # it raises
            held.append(cell)
    return held


# -- source --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A method's lines as they stand in its file, and the same parsed (from below a line that is put before
    them).
    """

    lines: list[bytes]
    margin: str
    parsed: ast.FunctionDef

    @property
    def numbers(self) -> list[ast.Constant]:
        defaults = (*self.parsed.args.defaults, *self.parsed.args.kw_defaults)
        nodes = itertools.chain(
            (node for node in defaults if node is not None), *map(ast.walk, self.parsed.body)
        )
        found = [
            node
            for node in nodes
            if isinstance(node, ast.Constant) and type(node.value) is int and self._is_there(node)
        ]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def _is_there(self, node: ast.Constant) -> bool:
        """Whether the number is where the parser says; of one in an f-string some versions of Python do not
        know.
        """
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


def _bare(method: ast.FunctionDef) -> None:
    """Decorators are around the function already, and what its defaults are computed of may be gone."""
    method.decorator_list = []
    method.args.defaults = [ast.Constant(None) for _ in method.args.defaults]
    method.args.kw_defaults = [
        None if default is None else ast.Constant(None) for default in method.args.kw_defaults
    ]
