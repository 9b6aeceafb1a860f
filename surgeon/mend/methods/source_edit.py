"""Numbers in the source of a module's own methods, and names of numbers: to change one.

A method is compiled anew from its source with one number changed, or with a number in place of a name; all
else stays as the user wrote it: comments, loops, decisions, both modes, what `super()` and closures mean,
annotations, decorators.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import types
from typing import Any

from surgeon.graph.source_code import CHANGED, _bare, _filled, _function, _inside, _Source, _source


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


def with_use(method: Any, which: int, text: str, new: int) -> Any:
    """The method with a number in place of one of its `uses` of a named one.

    Raises:
        ValueError: this name does not stand there, or there is no source.
    """
    function = _function(method)
    found = None if function is None else _source(function)
    if function is None or found is None:
        raise ValueError(f"the source of {getattr(method, '__qualname__', method)} cannot be read")
    if which >= len(found.uses) or found.text(found.uses[which]) != text:
        raise ValueError(f"{text!r} is not name {which} of {function.__qualname__}")
    return _around(method, _compiled(function, found, found.uses[which], new))


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


def _like(
    function: types.FunctionType, code: types.CodeType, cells: tuple[types.CellType, ...]
) -> types.FunctionType:
    """A function with other code or another closure."""
    made = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__doc__, made.__module__, made.__qualname__ = (
        function.__doc__,
        function.__module__,
        function.__qualname__,
    )
    made.__dict__.update(function.__dict__)
    return made


def _compiled(
    function: types.FunctionType, source: _Source, number: ast.expr, new: int
) -> types.FunctionType:
    """The function from its source with another number."""
    names = function.__code__.co_freevars
    text = source.with_number(number, new)
    if (
        source.margin
    ):  # closures and super() are what they were where the method stands in a function of the same names
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
        values = _with(
            number, new, arguments.kw_defaults, [known.get(arg.arg) for arg in arguments.kwonlyargs]
        )
        made.__kwdefaults__ = {
            arg.arg: value
            for arg, value in zip(arguments.kwonlyargs, values, strict=True)
            if arg.arg in known
        }
    return made


_files = itertools.count()


def _with(number: ast.expr, new: int, nodes: Any, values: Any) -> list[Any]:
    return [new if node is number else value for node, value in zip(nodes, values, strict=True)]
