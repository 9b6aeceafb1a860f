"""Control flow that torch writes as operators, run as what Python does: the branch that is taken, a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NotCompiled:
    """While it is entered, nothing is compiled."""

    def __enter__(self) -> Any:
        self.compiles = torch.compile
        torch.compile = _not_compiled  # type: ignore[assignment]  # it has overloads for the decorator with options
        return self

    def __exit__(self, *error: Any) -> None:
        torch.compile = self.compiles


class ControlFlow(NotCompiled, TorchFunctionMode):
    """Runs `cond` and `while_loop` in Python, so that their ops are seen, and nothing is compiled on the way."""

    def __enter__(self) -> ControlFlow:
        super().__enter__()
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_PYTHON:
            with self:
                return IN_PYTHON[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _not_compiled(function: Any = None, **options: Any) -> Any:
    """In place of `torch.compile`, the decorator with options as well."""
    return function if function is not None else lambda inner: inner


def _cond(pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
    return (true_fn if bool(pred) else false_fn)(*operands)


def _while_loop(cond_fn: Any, body_fn: Any, carried: Any, additional: Any = ()) -> Any:
    values = tuple(carried)
    while bool(cond_fn(*values, *additional)):
        out = body_fn(*values, *additional)
        values = tuple(out) if isinstance(out, list | tuple) else (out,)
    return values


IN_PYTHON: Mapping[Any, Callable[..., Any]] = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.while_loop: _while_loop,
}
