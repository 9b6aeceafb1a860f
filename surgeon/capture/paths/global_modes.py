"""Global modes of the process by which the model's own code may decide what to run: who asks, and other answers.

Such code runs differently while gradients are on, under autocast, or when it is scripted or exported. It can be
told another answer than holds, so that the other path is recorded as well.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.onnx
from torch import nn

from surgeon.capture.paths.source_tests import only_checks
from surgeon.graph.graph import Decision

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep

_SPACES: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "torch": (
        torch,
        ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"),
    ),
    "torch.jit": (torch.jit, ("is_scripting", "is_tracing")),
    "torch.onnx": (torch.onnx, ("is_in_onnx_export",)),
    "torch.compiler": (torch.compiler, ("is_compiling", "is_exporting", "is_dynamo_compiling")),
}


@contextlib.contextmanager
def answering(
    modules: Sequence[nn.Module], answers: Mapping[str, bool], asked: list[Decision] | None
) -> Iterator[None]:
    """While this holds, the user's code gets these answers about modes, and what it asks is noted.

    Args:
        answers: name of a mode, such as "torch.is_grad_enabled" -> what the user's code is told.
        asked: gets a decision for each question; None: nothing is noted.
    """
    if not answers and asked is None:
        yield
        return
    before: list[tuple[dict[str, Any], str, Any]] = []
    homes = {type(module).__module__ for module in modules}
    spaces = [
        vars(sys.modules[name]) for name in homes if name in sys.modules
    ]  # a file that was run may be in none
    told: dict[int, tuple[Any, Any]] = {}
    for path, (space, names) in _SPACES.items():
        for name in names:
            function = getattr(space, name)
            told[id(function)] = function, _told(f"{path}.{name}", function, answers, asked)
    own = {name for _, names in _SPACES.values() for name in names}
    try:
        for space, _ in _SPACES.values():
            _tell(vars(space), own, told, before)
        for held in spaces:
            _tell(held, list(held), told, before)
        yield
    finally:
        for held, name, function in before:
            held[name] = function


def _tell(
    held: dict[str, Any], names: Iterable[str], told: Mapping[int, tuple[Any, Any]], before: list[Any]
) -> None:
    """Put what tells in the place of functions that a space holds."""
    for name in names:
        value = held.get(name)
        function, instead = told.get(id(value), (None, None))
        if function is not None and function is value:
            before.append((held, name, function))
            held[name] = instead


def _told(
    name: str, function: Callable[..., bool], answers: Mapping[str, bool], asked: list[Decision] | None
) -> Callable[..., bool]:
    thread = threading.get_ident()  # others get the true answer

    def told(*args: Any, **kwargs: Any) -> bool:
        frame = sys._getframe(1)
        path = frame.f_code.co_filename
        if path.startswith((_TORCH_DIR, _OWN_DIR)) or threading.get_ident() != thread:
            return function(*args, **kwargs)
        answer = answers.get(name)
        answer = function(*args, **kwargs) if answer is None else answer
        if asked is not None and not only_checks(path, frame.f_lineno):
            asked.append(Decision("mode", name, str(answer), (path, frame.f_lineno)))
        return answer

    return told
