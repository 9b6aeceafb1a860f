"""untouched(model): a cut leaves the model that it was given, and the process, bit for bit as they were."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """What models hold (parameters, buffers, plain tensors, gradients, flags, hooks, numbers in lists and dicts)
    and what the process holds (generators, modes, switches) is the same after the block.
    """
    before = [_of_model(model) for model in models], _of_process()
    yield
    after = [_of_model(model) for model in models], _of_process()
    for old, new in zip(before[0], after[0], strict=True):
        _compare(old, new)
    _compare(before[1], after[1])


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert old.keys() == new.keys(), f"came or went: {sorted(old.keys() ^ new.keys())[:5]}"
    for name, value in old.items():
        if isinstance(value, Tensor):
            assert _same_bits(value, new[name]), f"{name} changed"
        else:
            assert value == new[name], f"{name} was {value} and is {new[name]}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.stride() != b.stride():
        return False
    return a.is_meta or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _of_model(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: class"] = id(type(module))
        for name, value in module.__dict__.items():
            found |= _of_value(f"{path}.{name}", value, depth=4)
    return found


def _of_value(path: str, value: Any, depth: int) -> dict[str, Any]:
    """The object that a name stands for and, for tensors and containers, what is in it."""
    found: dict[str, Any] = {path: id(value)}
    if isinstance(value, Tensor):
        found[f"{path}, place"] = value.data_ptr() if not value.is_meta else 0
        found[f"{path}, version"] = 0 if value.is_inference() else value._version
        found[f"{path}, asks for gradients"] = value.requires_grad
        found[f"{path}, bits"] = (
            value.detach().clone().reshape(-1) if not value.dim() else value.detach().clone()
        )
        if value.is_leaf and value.grad is not None:
            found |= _of_value(f"{path}.grad", value.grad, depth)
    elif isinstance(value, bool | int | float | str):
        found[path] = value
    elif isinstance(value, np.ndarray):
        found[f"{path}, bits"] = value.tobytes()
    elif isinstance(value, torch.Generator):
        found[f"{path}, state"] = value.get_state()
    elif depth and isinstance(value, dict):
        found[f"{path}, keys"] = list(map(repr, value))
        for key, item in value.items():
            found |= _of_value(f"{path}[{key!r}]", item, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for place, item in enumerate(value):
            found |= _of_value(f"{path}[{place}]", item, depth - 1)
    elif depth and not isinstance(value, nn.Module) and type(value).__module__ not in ("builtins", "torch"):
        for name, item in getattr(value, "__dict__", {}).items():
            found |= _of_value(f"{path}.{name}", item, depth - 1)
    return found


def _of_process() -> dict[str, Any]:
    hooks = torch.nn.modules.module
    state: dict[str, Any] = {
        "torch's generator": torch.get_rng_state(),
        "python's generator": random.getstate(),
        "numpy's generator": str(np.random.get_state()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "garbage collection": gc.isenabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "hooks of all modules": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
    }
    functional = vars(torch.nn.functional)
    state |= {name: id(functional[name]) for name in functional if name.startswith("has_torch_function")}
    for device in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
        state[f"generator of cuda:{device}"] = torch.cuda.get_rng_state(device)
    return state
