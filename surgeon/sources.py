"""Numbers in the source of a module's own methods, for forwards that torch.fx cannot trace: to look for one, and to change it.

A method is compiled anew from its source with one number changed; all else stays as the user wrote it: loops, decisions, both
modes, what `super()` and closures mean, annotations.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import textwrap
import types
from collections.abc import Iterator

from torch import nn


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
    parsed = _parsed(function)
    if parsed is not None:
        first = function.__code__.co_firstlineno
        for which, node in enumerate(_constants(parsed)):
            assert isinstance(node.value, int)
            yield which, first + node.lineno - parsed.lineno, node.value


def changed(function: types.FunctionType, which: int, old: int, new: int) -> types.FunctionType:
    """The method with one of its `numbers` changed.

    Raises:
        ValueError: there is no such number, or no source.
    """
    parsed = _parsed(function)
    if parsed is None:
        raise ValueError(f"the source of {function.__qualname__} cannot be read")
    found = list(_constants(parsed))
    if which >= len(found) or found[which].value not in (old, new):
        raise ValueError(f"it is not number {which} of {function.__qualname__}")
    found[which].value = new
    arguments = parsed.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]  # they are taken from the function
    arguments.kw_defaults = [None if default is None else ast.Constant(None) for default in arguments.kw_defaults]
    names = function.__code__.co_freevars
    outer = ast.parse(f"def _outer({', '.join(names)}):\n    return {parsed.name}").body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body.insert(0, parsed)
    source = ast.unparse(ast.fix_missing_locations(outer))
    file = f"<surgeon source {next(_files)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    code = compile(source, file, "exec", flags=annotations.compiler_flag, dont_inherit=True)
    space: dict[str, types.FunctionType] = {}
    exec(code, function.__globals__, space)  # the user's own code with another number
    inner = space["_outer"](*names).__code__
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    made = types.FunctionType(
        inner, function.__globals__, function.__name__, function.__defaults__, tuple(cells[name] for name in inner.co_freevars)
    )
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    made.__doc__, made.__module__, made.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    return made


_files = itertools.count()


def _parsed(function: types.FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError):
        return None
    found = tree[0] if len(tree) == 1 else None
    plain = isinstance(found, ast.FunctionDef) and not found.decorator_list and found.name == function.__name__
    return found if plain and isinstance(found, ast.FunctionDef) else None


def _constants(function: ast.FunctionDef) -> Iterator[ast.Constant]:
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                yield node
