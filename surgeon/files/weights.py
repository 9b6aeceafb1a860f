"""Weights of a model: from a safetensors file into the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from surgeon.errors import InputError

_FIX = "pass the weights of this architecture, all of them"


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, both of one version of it.

    Raises:
        InputError: the file is missing, damaged, or none.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("this is no regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(
            "cannot read the weights",
            where=str(path),
            why=str(error)[:400],
            fix="pass a safetensors file, as safetensors.torch.save_file(model.state_dict(), path) writes it",
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly; only a tied tensor may be in the file under one of its names.

    Raises:
        InputError: the file cannot be read, or does not fit.
    """
    fill(model, read_weights(path)[1], path)


def _kind(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype is torch.bool


def fill(model: nn.Module, loaded: Mapping[str, Tensor], path: Path, fix: str = _FIX) -> None:
    """Copy tensors of a file into a model, as `load_weights` does.

    Args:
        fix: what to do where they do not fit.

    Raises:
        InputError: they do not fit.
    """
    own = model.state_dict(keep_vars=True)
    odd = [
        f"{name} is {tensor.dtype} in the file and {own[name].dtype} in the model"
        for name, tensor in loaded.items()
        if name in own and isinstance(own[name], Tensor) and _kind(tensor.dtype) != _kind(own[name].dtype)
    ]
    if odd:
        raise InputError(
            "the weights are of another kind than the model's",
            where=str(path),
            why="; ".join(odd[:3]) + (f"; and {len(odd) - 3} more" if len(odd) > 3 else ""),
            fix="pass weights as the model has them: codes of quantised ones mean nothing without their scales",
        )
    try:
        missing, unexpected = model.load_state_dict(loaded, strict=False)
    except RuntimeError as error:
        missing, unexpected, wrong = [], [], [line.strip() for line in str(error).splitlines()[1:]]
    else:
        filled = {own[name].data_ptr() for name in loaded if name in own}
        wrong = [f"no {name} in the file" for name in missing if own[name].data_ptr() not in filled]
        wrong += [f"no {name} in the model" for name in unexpected]
    if wrong:
        raise InputError(
            "the weights do not fit the model",
            where=str(path),
            why="; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            fix=fix,
        )
