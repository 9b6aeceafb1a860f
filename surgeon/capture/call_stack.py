"""Where a running model is: the module that runs, and the user's line of code."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import types
from typing import Any

import torch
from torch import nn

from surgeon.graph.module_tree import named_modules
from surgeon.graph.source_code import CHANGED

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep


class CallStack(contextlib.ExitStack):
    """Knows, while a model runs, the path of the innermost module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths = {id(module): path for path, module in named_modules(model)}
        self._stack: list[str] = [""]
        self._thread = threading.get_ident()  # the hooks are called in all threads

    @property
    def current(self) -> str:
        """The path of the module that runs, "" for the model itself."""
        return self._stack[-1]

    @property
    def owner(self) -> str:
        """The path of the module whose method runs: below `current` where code calls a part by a method
        (`self.bias.table()`).
        """
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(first, nn.Module) and id(first) in self._paths:
                path = self._paths[id(first)]
                return path if not self.current or path.startswith(f"{self.current}.") else self.current
            frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
        return self.current

    def __enter__(self) -> CallStack:
        hooks = torch.nn.modules.module
        before = hooks.register_module_forward_pre_hook(self._push)
        after = hooks.register_module_forward_hook(self._pop, always_call=True)
        self.callback(before.remove)
        self.callback(after.remove)
        return self

    def _push(self, module: nn.Module, _args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _pop(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        if len(self._stack) > 1 and threading.get_ident() == self._thread:
            self._stack.pop()


def user_line() -> tuple[str, int] | None:
    """(file, line) of the innermost frame that is neither torch's nor surgeon's; None if the call came from
    torch alone.
    """
    frame = sys._getframe(2)
    while frame is not None:
        whose = _whose(frame.f_code)
        if whose:
            return (frame.f_code.co_filename, frame.f_lineno) if whose == _USERS else None
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return None


_USERS, _ENTRANCE = 1, 2


@functools.lru_cache(maxsize=1 << 14)
def _whose(code: types.CodeType) -> int:
    """Whether code is the user's, or where surgeon starts to record; 0 for what lies between."""
    path = code.co_filename
    if path.startswith(_OWN_DIR):
        return _ENTRANCE if path.endswith("capture.py") and code.co_name == "capture" else 0
    between = path.startswith(_TORCH_DIR) or (path.startswith("<") and not path.startswith(CHANGED))
    return 0 if between else _USERS
