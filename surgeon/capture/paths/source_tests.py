"""What the user's source does with a comparison: whether the way not taken could be taken at all.

A check that raises, warns or asserts shows no other path: where it fails the original fails as well.
"""

from __future__ import annotations

import ast
import dis
import itertools
import linecache
import types
from collections.abc import Sequence
from functools import lru_cache

_DECIDING = ("COMPARE", "CONTAINS", "UNARY_NOT", "TO_BOOL", "POP_JUMP", "JUMP_IF")
_TELLING = ("warn", "print", "debug", "info", "error", "log", "assert", "check", "exception")


def compares(frame: types.FrameType) -> bool:
    """Whether the frame's own code compares or branches now; `max(a, b)` compares elsewhere and gives a number."""
    code = frame.f_code.co_code
    return dis.opname[code[frame.f_lasti]].startswith(_DECIDING)


def only_checks(path: str, line: int) -> bool:
    """Whether all that a comparison at this line decides is whether the code fails or tells something."""
    tests = [node for first, last, node in _tests(path) if first <= line <= last]
    return bool(tests) and all(map(_is_check, tests))


def holds_a_test(path: str, line: int) -> bool:
    """Whether something is compared or tested at this line."""
    return any(first <= line <= last for first, last, _ in _tests(path)) or compares_numbers(path, line)


def compares_numbers(path: str, line: int) -> bool:
    """Whether something is compared at this line, other than by `is`."""
    return line in _compared(path)


_LOOKING_UP = ("get", "setdefault", "pop")


def looks_up(path: str, line: int) -> bool:
    """Whether something is looked up in a container at this line."""
    return line in _looked_up(path)


@lru_cache(maxsize=256)
def _looked_up(path: str) -> frozenset[int]:
    lines = (
        range(n.lineno, (n.end_lineno or n.lineno) + 1)
        for n in ast.walk(_tree(path))
        if (isinstance(n, ast.Subscript) and getattr(n.value, "attr", "") != "shape")
        or (isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _LOOKING_UP)
    )
    return frozenset(itertools.chain.from_iterable(lines))


@lru_cache(maxsize=256)
def _compared(path: str) -> frozenset[int]:
    """The lines of a file that hold comparisons."""
    lines = (
        range(n.lineno, (n.end_lineno or n.lineno) + 1)
        for n in ast.walk(_tree(path))
        if isinstance(n, ast.Compare) and not all(isinstance(o, ast.Is | ast.IsNot) for o in n.ops)
    )
    return frozenset(itertools.chain.from_iterable(lines))


@lru_cache(maxsize=256)
def _tests(path: str) -> tuple[tuple[int, int, ast.AST], ...]:
    """(first line, last line, statement) of each test in a file."""
    found = []
    for node in ast.walk(_tree(path)):
        test = _test(node)
        if test is not None and test.end_lineno is not None:
            found.append((test.lineno, test.end_lineno, node))
    return tuple(found)


@lru_cache(maxsize=256)
def deciding(path: str) -> tuple[tuple[int, frozenset[str], frozenset[str]], ...]:
    """(line, attributes, texts) of all in a file by which code chooses what to compute: tests that are more than
    checks, what is matched, indices.
    """
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            asked: Sequence[ast.expr] = [] if _is_check(node) else [node.test]
        elif isinstance(node, ast.comprehension):
            asked = node.ifs
        elif isinstance(node, ast.BoolOp):
            asked = node.values[:-1]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        else:
            asked = [node.slice] if isinstance(node, ast.Subscript) else []
        for part in asked:
            inner = list(ast.walk(part))
            attributes = frozenset(n.attr for n in inner if isinstance(n, ast.Attribute))
            texts = frozenset(
                n.value for n in inner if isinstance(n, ast.Constant) and isinstance(n.value, str)
            )
            if attributes or texts:
                found.append((part.lineno, attributes | texts, texts))
    return tuple(found)


def _tree(path: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(path)))
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _test(node: ast.AST) -> ast.expr | None:
    """What a statement or an expression decides by."""
    if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return node.test
    return node if isinstance(node, ast.Call) and _tells(node) and node.args else None


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return any(body and all(map(_harmless, body)) for body in (node.body, node.orelse))
    return isinstance(node, ast.Assert | ast.Call)


def _harmless(statement: ast.stmt) -> bool:
    """Whether a statement computes nothing that a model gives: it raises, warns, or does nothing."""
    if isinstance(statement, ast.If):
        return _all_harmless(statement.body) and _all_harmless(statement.orelse)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant) or (
            isinstance(statement.value, ast.Call) and _tells(statement.value)
        )
    return isinstance(statement, ast.Raise | ast.Assert | ast.Pass)


def _all_harmless(body: Sequence[ast.stmt]) -> bool:
    return all(map(_harmless, body))


def _tells(call: ast.Call) -> bool:
    """Whether a call is one of a function that checks or tells something, by its name."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return any(part in name.lower() for part in _TELLING)
