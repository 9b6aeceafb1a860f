"""Every test here also holds that surgery leaves the model and the process bit for bit as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from untouched import untouched

import surgeon
from surgeon.api.surgery import Surgery


def _watched(function: Callable[..., Any], model_of: Callable[[Any], nn.Module]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        with untouched(model_of(first)):
            return function(first, *args, **kwargs)

    return run


@pytest.fixture(autouse=True)
def nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shrink", "inspect", "verify"):
        monkeypatch.setattr(surgeon, name, _watched(getattr(surgeon, name), lambda model: model))
    for name in ("plan", "cut"):
        monkeypatch.setattr(Surgery, name, _watched(getattr(Surgery, name), lambda surgery: surgery.model))
