"""The source of a module's own methods: which there are, what they name, the numbers in them and the names of
numbers.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import types
from collections.abc import Iterable, Iterator
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
        found = methods_of_class(kind) | found
    return found


def methods_as_written(module: nn.Module) -> dict[str, Any]:
    """The same as the user wrote them, where numbers in the module's code were changed; also those that others override
    and that may be reached by `super()`, as "Class.method".
    """
    found: dict[str, Any] = {}
    calls_super = False
    for kind in own_classes(module):
        if "_surgeon_edits" in vars(kind):
            continue
        own = methods_of_class(kind)
        for name, value in own.items():
            if name not in found:
                found[name] = value
            elif calls_super:
                found.setdefault(f"{kind.__name__}.{name}", value)
        calls_super = calls_super or any("super" in names_used(value) for value in own.values())
    return found


def methods_of_class(kind: type) -> dict[str, Any]:
    """The methods and properties that one class defines itself."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__") and _function(value) is not None
    }


def is_traced(method: Any) -> bool:
    """Whether a method is what torch.fx made of one."""
    function = _function(method)
    return function is not None and function.__code__.co_filename.startswith(TRACED)


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


@dataclasses.dataclass(frozen=True)
class Use:
    """The name of a whole number in a method, where it is read.

    Attributes:
        which: it is of all names that the method reads.
        text: the name as it stands, such as "self.width", "self.sizes[1]" or "n".
        file, line: where it stands.
        value: the number; None for a local name, of which nothing is known before it runs.
    """

    which: int
    text: str
    file: str
    line: int
    value: int | None


def uses(method: Any, module: Any) -> Iterator[Use]:
    """Names of whole numbers in a method, as they stand.

    Args:
        module: of which it is a method; attributes are read there. Global names are left out.
    """
    function = _function(method)
    found = None if function is None else _source(function)
    if function is None or found is None:
        return
    code, owner = function.__code__, None if isinstance(method, staticmethod) else module
    taken_apart = {
        id(n.value) for n in ast.walk(found.parsed) if isinstance(n, ast.Subscript | ast.Attribute)
    }
    for which, node in enumerate(found.uses):
        if id(node) in taken_apart:  # no number, but something that holds others
            continue
        value = _value(function, owner, node)
        if type(value) is int or (value is _UNKNOWN and isinstance(node, ast.Name)):
            known = value if type(value) is int else None
            line = code.co_firstlineno + node.lineno - 2
            yield Use(which, found.text(node), code.co_filename, line, known)


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

    @property
    def uses(self) -> list[ast.expr]:
        """Names, attributes of names and items of those, each as far as it goes, that are read and not
        called.
        """
        found = [node for statement in self.parsed.body for node in _read(statement)]
        return sorted(
            (node for node in found if node.lineno == node.end_lineno),
            key=lambda node: (node.lineno, node.col_offset),
        )

    def _is_there(self, node: ast.Constant) -> bool:
        """Whether the number is where the parser says; of one in an f-string some versions of Python do not
        know.
        """
        with contextlib.suppress(ValueError):
            return node.lineno == node.end_lineno and int(self.text(node), 0) == node.value
        return False

    def text(self, node: ast.expr) -> str:
        return self.lines[node.lineno - 2][node.col_offset : node.end_col_offset].decode()

    def with_number(self, node: ast.expr, new: int) -> str:
        lines, at = list(self.lines), node.lineno - 2
        lines[at] = lines[at][: node.col_offset] + str(new).encode() + lines[at][node.end_col_offset :]
        return b"".join(lines).decode()


_UNKNOWN = object()


def _read(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and _is_path(node.func):
        children: Iterable[ast.AST] = (*node.args, *node.keywords)
    elif isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef | ast.JoinedStr):
        return  # names mean something else there, or have no place in the text
    elif isinstance(node, ast.expr) and _is_path(node):
        if isinstance(getattr(node, "ctx", None), ast.Load):
            yield node
        return
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _read(child)


def _is_path(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and _is_path(node.value)
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_path(node.value))


def _value(function: types.FunctionType, module: Any, node: ast.expr) -> Any:
    """What a path stands for; `_UNKNOWN` if it begins with a local name, or with nothing that is there."""
    try:
        if isinstance(node, ast.Attribute):
            owner = _value(function, module, node.value)
            return owner if owner is _UNKNOWN else getattr(owner, node.attr)
        if isinstance(node, ast.Subscript):
            owner = _value(function, module, node.value)
            return owner if owner is _UNKNOWN else owner[node.slice.value]  # type: ignore[attr-defined]  # a constant
        assert isinstance(node, ast.Name)
        code = function.__code__
        if node.id in code.co_varnames[: min(code.co_argcount, 1)]:
            return module
        if node.id in code.co_freevars:
            return (function.__closure__ or ())[code.co_freevars.index(node.id)].cell_contents
        local = node.id in code.co_varnames or node.id in code.co_cellvars
        return _UNKNOWN if local else None  # a global name is no number of the module's own
    except (AttributeError, LookupError, TypeError, ValueError):
        return _UNKNOWN


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
