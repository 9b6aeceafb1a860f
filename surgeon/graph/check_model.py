"""check_model(model): refuse modules that cannot be recorded and cut, at the entrance and with what to do instead."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgeon.errors import CaptureError, InputError
from surgeon.graph.module_tree import named_modules, named_registered

_QUANTISED = (
    "torch.ao.nn", "torch.ao.quantization", "torch.nn.quantized", "torch.quantization", "torchao", "bitsandbytes",
    "optimum.quanto", "auto_gptq", "gptqmodel", "awq", "hqq",
)  # fmt: skip
_SHARDED = (
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "torch.distributed.tensor",
    "deepspeed",
)
_EXPORTED = ("torch.export",)
_HARMLESS = (
    "QuantStub",
    "DeQuantStub",
    "QuantWrapper",
    "FloatFunctional",
)  # of a model that is not quantised yet


# What it is -> why it cannot be cut, and what to do instead.
_REFUSED = {
    "a TorchScript module": (
        "its forward is compiled and its sizes are constants of the compiled code",
        "pass the original nn.Module and script the small model afterwards",
    ),
    "a module of an exported program": (
        "sizes are constants of the exported graph, and it knows one mode alone",
        "pass the original nn.Module, and export the small model",
    ),
    "a quantised model": (
        "its weights are packed, or prepared to be, for the sizes that they have",
        "cut the original model, then quantise the small one",
    ),
    "a sharded model": (
        "each process holds a part of its tensors",
        "cut the model before it is sharded, then shard the small one (surgeon.broadcast_plan gives all processes one plan)",
    ),
}


def check_model(model: Any) -> None:
    """Refuse what is no model that can be cut.

    Raises:
        InputError: it has lazy layers that have not run yet.
        CaptureError: it is no module, or compiled, exported, quantised or sharded.
    """
    if not isinstance(model, nn.Module):
        exported = _comes_from(type(model), _EXPORTED)
        fix = "pass the nn.Module that was exported" if exported else "pass the model itself"
        if isinstance(model, type):
            fix = f"pass a model of this class: {model.__name__}(...)"
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}", fix=fix)
    if isinstance(model, torch.jit.ScriptModule):
        raise _refused("a TorchScript module")
    for path, module in named_modules(model):
        kind = _kind_of(module)
        if kind:
            raise _refused(kind, f"{path or 'the model'} ({type(module).__name__})")
    for name, tensor in (*named_registered(model, "_parameters"), *named_registered(model, "_buffers")):
        _check_tensor(name, tensor)


def _kind_of(module: nn.Module) -> str:
    """What a module is that cannot be cut; "" if it can."""
    kind = type(module)
    if _comes_from(kind, _EXPORTED):
        return "a module of an exported program"
    if _comes_from(kind, _SHARDED):
        return "a sharded model"
    prepared = isinstance(getattr(module, "activation_post_process", None), nn.Module)
    quantised = _comes_from(kind, _QUANTISED) and (kind.__name__ not in _HARMLESS or prepared)
    return "a quantised model" if quantised else ""


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise InputError(
            "the model has lazy layers whose tensors have no size yet",
            where=name,
            fix="call model(...) once on the example inputs, then try again",
        )
    if _comes_from(type(tensor), _SHARDED) or hasattr(tensor, "ds_id"):
        raise _refused("a sharded model", name)
    if tensor.is_quantized or _comes_from(type(tensor), _QUANTISED):
        raise _refused("a quantised model", name)
    if is_traceable_wrapper_subclass(tensor):
        raise CaptureError(
            f"a tensor of the model is a {type(tensor).__name__}, which cannot be cut",
            where=name,
            why="it holds its values in a form of its own",
            fix="pass the model with plain tensors, and wrap those of the small model",
        )


def _refused(kind: str, where: str = "") -> CaptureError:
    why, fix = _REFUSED[kind]
    return CaptureError(f"{kind} cannot be cut", where=where, why=why, fix=fix)


def _comes_from(kind: type, packages: tuple[str, ...]) -> bool:
    """Whether a class, or one that it builds on, is one of these packages."""
    return _any_from(kind.__mro__, packages)


@functools.lru_cache(maxsize=4096)
def _any_from(kinds: tuple[type, ...], packages: tuple[str, ...]) -> bool:
    roots = tuple(f"{package}." for package in packages)
    return any(f"{kind.__module__}.".startswith(roots) for kind in kinds)
