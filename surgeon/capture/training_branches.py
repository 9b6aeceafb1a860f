"""decides_by_mode(model) -> bool: whether code of the model's own runs something else while it trains.

Told from the source: an `if` that hangs on `self.training` and on nothing that settles it otherwise (a drop
rate of zero, say). A mode that is only handed on, to a dropout, changes no size.
"""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from surgeon.graph.source_code import methods, names_used, parsed

_PLAIN = (ast.Name, ast.Attribute, ast.Constant, ast.expr_context)
_TESTS = (*_PLAIN, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.cmpop)


def decides_by_mode(model: nn.Module) -> bool:
    """Whether a method of one of the modules decides by `self.training` what it computes."""
    known: dict[Any, list[tuple[str, ast.expr]]] = {}
    for module in model.modules():
        if isinstance(
            module, nn.modules.batchnorm._NormBase
        ):  # it decides between its statistics and the batch's
            continue
        for method in methods(module).values():
            if method not in known:
                known[method] = _decisions(parsed(method)) if names_used(method) & {"training"} else []
            for owner, test in known[method]:
                modes = [_value(test, owner, module, training) for training in (False, True)]
                if modes[0] is None or modes[0] != modes[1]:
                    return True
    return False


def _decisions(method: ast.FunctionDef | None) -> list[tuple[str, ast.expr]]:
    """(what the method calls its module, test) of each decision that names the mode."""
    if method is None or not method.args.args:
        return []
    owner = method.args.args[0].arg
    found = [node for node in ast.walk(method) if isinstance(node, ast.If | ast.While | ast.IfExp)]
    found = [node for node in found if any(_is_mode(part, owner) for part in ast.walk(node.test))]
    return [(owner, node.test) for node in found if not _hands_on(node)]


def _hands_on(decision: ast.AST) -> bool:
    """Whether it chooses between two numbers, as `p if self.training else 0.0` does."""
    return isinstance(decision, ast.IfExp) and _only(decision.body, _PLAIN) and _only(decision.orelse, _PLAIN)


def _is_mode(node: ast.AST, owner: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "training"
        and _only(node, _PLAIN)
        and ast.unparse(node.value) == owner
    )


def _only(node: ast.AST, kinds: tuple[type, ...]) -> bool:
    return all(isinstance(part, kinds) for part in ast.walk(node))


def _value(test: ast.expr, owner: str, module: nn.Module, training: bool) -> bool | None:
    """What a test gives in a mode, as far as the module's attributes settle it; None: other things count."""
    if isinstance(test, ast.BoolOp):
        parts = [_value(part, owner, module, training) for part in test.values]
        settles = isinstance(test.op, ast.Or)
        return settles if settles in parts else None if None in parts else not settles
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _value(test.operand, owner, module, training)
        return None if inner is None else not inner
    if _is_mode(test, owner):
        return training
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    if names != {owner} or not _only(test, _TESTS) or any(_is_mode(node, owner) for node in ast.walk(test)):
        return None
    try:
        return bool(eval(ast.unparse(test), {owner: module}))  # attributes and comparisons alone
    except Exception:  # noqa: BLE001  # a property may raise anything
        return None
