"""accuracy(model, batches) -> the share of right classes; and what counts as right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError
from surgeon.training.batches import check_batches, placed, run, split
from surgeon.training.losses import stated_logits


def hits(output: Any, targets: Any) -> tuple[int, int]:
    """(right, all) of class predictions; (0, 0) where the targets are no class indices that fit logits
    [samples, classes, ...]."""
    found = stated_logits(output)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or found is None or found.dim() < 2:
        return 0, 0
    if found.shape[:1] + found.shape[2:] != targets.shape:
        return 0, 0
    return int((found.detach().argmax(1) == targets).sum()), targets.numel()


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """The share of right classes over batches of pairs (inputs, class indices), in eval mode; the model comes
    back as it was.

    Raises:
        InputError: no batches, or targets that are no class indices that fit the output.
    """
    check_batches(batches, "evaluate")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    right = total = 0
    with in_eval_mode(model), torch.no_grad():
        for number, batch in enumerate(batches, 1):
            inputs, targets = split(placed(batch, device))
            found = hits(run(model, inputs, f"batch {number} of the evaluation"), targets)
            if not found[1]:
                raise InputError(
                    f"no accuracy can be computed of batch {number} of the evaluation",
                    why="the targets are no class indices that fit logits [samples, classes, ...]",
                    fix="pass evaluate=..., a callable (model) -> number, higher is better",
                )
            right, total = right + found[0], total + found[1]
    if not total:
        raise InputError("evaluate holds no batch", fix="pass a list of batches, or a loader")
    return right / total


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own mode is put back."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
