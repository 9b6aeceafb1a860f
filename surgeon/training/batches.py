"""Batches of training data: what a batch is, which process sees which, in which order, and what is no
data.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
import torch.utils._pytree
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgeon.capture.batches import check_iterable, does_not_run
from surgeon.capture.model_state import output_of
from surgeon.errors import InputError


def check_batches(batches: Any, name: str) -> None:
    """Refuse what cannot be read again and again.

    Raises:
        InputError: it is no iterable of batches, an iterator, or empty.
    """
    check_iterable(batches, name, "(inputs, targets)")
    if isinstance(batches, Iterator):
        raise InputError(
            f"{name} is an iterator, which can be read only once",
            why="each epoch reads it from the start",
            fix="pass a list, a DataLoader, or an object whose __iter__ makes a fresh iterator",
        )
    if isinstance(batches, Sized) and _length(batches) == 0:
        raise InputError(f"{name} holds no batch", fix="pass a list of batches, or a loader")


def count(batches: Iterable[Any], steps: int | None, processes: int = 1) -> int:
    """How many batches an epoch has, for one of several processes.

    Raises:
        InputError: the length is not known, or not positive, or there are more processes than batches.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps must be a positive whole number, got {steps!r}")
    length = _length(batches)
    if length is None and steps is None:
        raise InputError(
            "train has no length (it may be infinite)",
            why="the learning rate follows a schedule over all steps",
            fix="pass steps=..., how many batches make an epoch",
        )
    if length is None:
        assert steps is not None
        return steps
    if not isinstance(batches, DataLoader):
        length //= processes
    if not length:
        raise InputError(
            f"train holds fewer batches than there are processes ({processes})",
            fix="pass more, smaller batches",
        )
    return length if steps is None else min(steps, length)


def own_share(batches: Iterable[Any], rank: int, processes: int) -> Iterator[Any]:
    """Every `processes`-th batch, from number `rank` on; rounds in which some process would have none are
    left out.
    """
    for together in zip(*[iter(batches)] * processes, strict=False):
        yield together[rank]


def split(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a pair; anything else is inputs, and targets are None."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def placed(tree: Any, device: torch.device) -> Any:
    """A nest of tensors on a device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), tree)


def run(model: nn.Module, inputs: Any, label: str) -> Any:
    """The model's output for inputs: a tensor, a tuple or list (positional) or a mapping (keywords).

    Raises:
        InputError: the model does not run on them.
    """
    try:
        if isinstance(inputs, Mapping):
            return output_of(model, (), dict(inputs))
        return output_of(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})
    except Exception as error:  # the model's own code: anything may come out of it, and all of it is reported
        raise does_not_run(
            error, label, inputs, "let the data yield pairs (inputs, targets), inputs as the model takes them"
        ) from error


def seed_all(seed: int, batches: Iterable[Any]) -> None:
    """Seed torch, numpy and Python, and the generators by which a loader shuffles."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for generator in _generators(batches):
        generator.manual_seed(seed)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Those of a loader and of its samplers, wrapped ones included."""
    if isinstance(generator := getattr(loader, "generator", None), torch.Generator):
        yield generator
    for name in ("sampler", "batch_sampler"):
        inner = getattr(loader, name, None)
        if inner is not None and inner is not loader:
            yield from _generators(inner)


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # of no length, or a loader of a dataset without one
        return None
