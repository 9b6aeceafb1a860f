"""What a process has once: the lock under which models run and are copied, and the state that the caller's code set
for torch (autocast, inference mode, a default device), left while surgeon works.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
import threading
from collections.abc import Iterator

import torch
from torch import nn

LOCK = threading.RLock()
"""Held while a model runs or is copied: a run changes the model and draws from generators, and puts both back."""

_FRAMES, _FLAT = 20, 16  # of Python for each level of modules; levels for which the usual limit will do

_default_device: contextvars.ContextVar[torch.device | None] = contextvars.ContextVar(
    "default device", default=None
)


@contextlib.contextmanager
def deep_enough(model: nn.Module) -> Iterator[None]:
    """Room for the calls of a model whose modules are nested deep: a recorded call takes more frames than a plain one."""
    before, depth, level = sys.getrecursionlimit(), 0, [model]
    seen: set[int] = set()
    while level:
        seen.update(map(id, level))
        inner = [
            m for module in level for m in module._modules.values() if m is not None and id(m) not in seen
        ]
        level, depth = list({id(m): m for m in inner}.values()), depth + 1
    with LOCK:  # the limit is that of all threads
        try:
            sys.setrecursionlimit(before + _FRAMES * max(0, depth - _FLAT))
            yield
        finally:
            sys.setrecursionlimit(before)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """No autocast, no inference mode, and new tensors on the CPU, whatever the caller is in.

    Also a decorator. The caller's default device counts again while a model runs (`callers_device`).
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        ambient = torch.get_default_device()
        if ambient.type != "cpu":
            before = _default_device.set(ambient)
            stack.callback(_default_device.reset, before)
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def callers_device(meta: bool) -> Iterator[None]:
    """The caller's default device: code of models may count on it.

    Args:
        meta: whether the model is on the meta device; else a default of "meta" would leave its code without
            values.
    """
    ambient = _default_device.get()
    if ambient is None or (ambient.type == "meta" and not meta):
        yield
    else:
        with torch.device(ambient):
            yield
