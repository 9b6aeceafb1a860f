"""Batches that a user passes: what counts as some, what one holds, how it is recorded, and what a loss of it
must be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.capture.inputs import normalize
from surgeon.errors import CaptureError, InputError, SurgeonError
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import tensor_leaves

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def check_iterable(batches: Any, name: str, element: str = "batch") -> None:
    """Refuse what is no iterable of batches, such as one batch.

    Raises:
        InputError: so it is.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise InputError(
            f"{name} must be an iterable of batches, got a {type(batches).__name__}",
            fix=f"pass a list such as {name}=[{element}], or a loader",
        )


def no_batch(name: str) -> InputError:
    """The error for an iterable that held nothing."""
    return InputError(
        f"{name} holds no batch",
        why="an iterator that was read before is empty",
        fix="pass a list of batches, or a fresh iterator",
    )


def normal(batch: Any, label: str) -> Batch:
    """The arguments of a batch of inputs.

    Raises:
        InputError: it holds no tensor, or NaN.
    """
    try:
        return normalize(batch)
    except InputError as error:
        what = f"{label} cannot be used: {error.what.replace('example_inputs', 'it')}"
        raise InputError(what, where=error.where, fix=error.fix) from error


def samples_of(inputs: Any) -> int:
    """Rows of the first tensor that has any."""
    return next((tensor.shape[0] for _, tensor in tensor_leaves(inputs) if tensor.dim()), 1)


def described(tree: Any) -> str:
    """Paths, shapes and types of the tensors in a nest."""
    return ", ".join(f"{path} {tuple(t.shape)} {t.dtype}" for path, t in tensor_leaves(tree)) or "no tensor"


def does_not_run(error: Exception, label: str, inputs: Any, fix: str) -> InputError:
    """The error for a model that raised one on a batch."""
    what = f"the model does not run on {label}: {type(error).__name__}: {error}"
    return InputError(what, why=f"inputs were: {described(inputs)}", fix=fix)


def record(model: nn.Module, args: Any, kwargs: Any, label: str, fix: str) -> Graph:
    """The graph of a model's run on a batch.

    Raises:
        InputError: the model does not run on it.
    """
    try:
        return capture(model, kwargs or args)
    except CaptureError as error:
        what = error.what.removeprefix("the model does not run on the example inputs: ")
        raise InputError(
            f"the model does not run on {label}: {what}", where=error.where, why=error.why, fix=fix
        ) from error


def one_number(compute: Callable[[], Any], label: str, why: str = "") -> Tensor:
    """What a loss gives for a batch, without dimensions.

    Raises:
        InputError: it fails, or is not one number with a gradient.
    """
    try:
        value = compute()
    except SurgeonError:
        raise
    except Exception as error:  # the model's own code: all of it is reported
        raise InputError(
            f"the loss fails on {label}: {type(error).__name__}: {error}",
            why=why,
            fix="pass a function loss(output, targets) that gives one number, and targets that fit the output",
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise InputError(
            f"the loss of {label} is {shape}" + (" without a gradient" if isinstance(value, Tensor) else ""),
            fix="pass a function loss(output, targets) that gives one number computed from the output by torch",
        )
    return value.reshape(())
