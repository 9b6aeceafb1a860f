"""The model that a command names, with its weights and its example input."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from surgeon.cli.models import build
from surgeon.cli.reported import note
from surgeon.errors import InputError
from surgeon.files import load_weights

_LARGEST_INPUT = 1 << 30  # entries


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of the command line: where it is, its weights, its example input."""

    model: str
    weights: Path | None
    shape: str | None
    dtype: str
    seed: int


def stage(name: str, *, quiet: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A spinner, on terminals only; quiet where a bar of its own shows how it goes on."""
    return contextlib.nullcontext() if quiet else Console(stderr=True).status(name)


def load(source: Source) -> tuple[nn.Module, Any]:
    """The model in eval mode with its weights, and example inputs (None: to be found)."""
    sizes = _sizes(source.shape)
    weights = (
        None if source.weights is None else source.weights.absolute()
    )  # the factory may change the folder
    torch.manual_seed(source.seed)
    with stage("load"):
        net = build(source.model).eval()
    if weights is None:
        note("no --weights were given, so the weights are random")
    else:
        load_weights(net, weights)
    if sizes is None:
        return net, None
    if source.dtype == "float32":
        return net, torch.randn(sizes)
    words = next((m.num_embeddings for m in net.modules() if isinstance(m, nn.Embedding)), 2)
    return net, (torch.arange(math.prod(sizes)) % words).reshape(sizes)


def _sizes(shape: str | None) -> list[int] | None:
    if shape is None:
        return None
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or math.prod(sizes) > _LARGEST_INPUT:
        raise InputError(
            f"--input {shape!r} is not a shape",
            why=f"it takes positive whole numbers, and at most {_LARGEST_INPUT:,} entries in all",
            fix="pass a shape such as --input 1,3,224,224",
        )
    return sizes
