"""What `recover` was asked for: steps, batches and options, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.batches import Batch, check_iterable, no_batch, normal, samples_of
from surgeon.cut.plan import Plan, check_fit
from surgeon.errors import InputError

STEPS = ("refit", "means", "variance", "batch_norm", "distill")
DEFAULT = ("refit", "batch_norm")
STRONGER = (0.1, 1.0, 10.0)  # ridges of all layers at once
_LIMIT = 50_000  # samples that are read at most


def check_steps(steps: Sequence[str]) -> None:
    """Refuse what is no list of steps.

    Raises:
        InputError: so it is.
    """
    known = ", ".join(STEPS)
    if isinstance(steps, str):
        raise InputError(f"steps must be a list of names, got {steps!r}", fix=f"use some of {known}")
    for name in steps:
        if name not in STEPS:
            raise InputError(f"unknown step {name!r}", fix=f"use some of {known}")


def check_options(
    steps: Sequence[str],
    held_out: float,
    ridges: Sequence[float] | None,
    epochs: int | None,
    rate: float | None,
) -> None:
    """Refuse steps and options of which one is out of range, or none of the steps has a use for it."""
    check_steps(steps)
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be a share in (0, 1), got {held_out}")
    if ridges is not None and min(ridges, default=0) <= 0:
        raise InputError(
            f"ridges must be positive numbers, got {ridges}",
            why="without any, dead channels have no solution",
        )
    if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
        raise InputError(f"epochs must be a positive whole number, got {epochs!r}")
    if rate is not None and not 0 < rate < 1:
        raise InputError(f"rate must be a share in (0, 1), got {rate!r}")
    for name, value in (("epochs", epochs), ("rate", rate)):
        if value is not None and "distill" not in steps:
            raise InputError(
                f"{name} is an option of the step 'distill'", fix=f"pass steps={[*steps, 'distill']}"
            )


def batches_of(batches: Iterable[Any]) -> list[Any]:
    """All batches of an iterable.

    Raises:
        InputError: none, or more than the limit (an endless iterator, say).
    """
    check_iterable(batches, "batches")
    found: list[Any] = []
    samples = 0
    for batch in batches:
        found.append(batch)
        samples += samples_of(normal(batch, f"batch {len(found)}"))
        if samples > _LIMIT:
            raise InputError(
                f"the batches hold more than {_LIMIT} samples",
                why="they are all held in memory, and an endless iterator has no end",
                fix="pass some thousand samples, such as itertools.islice(loader, 20)",
            )
    if not found:
        raise no_batch("batches")
    return found


def split(batches: list[Batch], share: float) -> tuple[list[Batch], list[bool]]:
    """The batches, and whether each is held out; a single one is cut in two along its samples.

    Raises:
        InputError: there is a single sample.
    """
    if len(batches) == 1:
        count = samples_of(batches[0])
        if count < 2:
            raise InputError(
                "one sample is too little to recover from",
                why="nothing is left to judge by",
                fix="pass some hundred samples",
            )
        aside = max(1, round(count * share))
        return [_rows(batches[0], 0, count - aside), _rows(batches[0], count - aside, count)], [False, True]
    aside = min(max(1, math.ceil(len(batches) * share - 0.5)), len(batches) - 1)
    return batches, [number >= len(batches) - aside for number in range(len(batches))]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    count = samples_of(batch)

    def some(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() and tensor.shape[0] == count else tensor

    found: Batch = torch.utils._pytree.tree_map_only(Tensor, some, batch)
    return found


def check_made_by(plan: Plan, small: nn.Module, model: nn.Module) -> None:
    check_fit(plan, model)
    shapes = dict(small.named_parameters())
    for name, tensor in model.named_parameters():
        want = [len(plan.kept.get(name, {}).get(d, range(n))) for d, n in enumerate(tensor.shape)]
        if name not in shapes or list(shapes[name].shape) != want:
            raise InputError(
                "the small model is not what the plan makes of the model",
                where=name,
                why=f"its shape is {list(shapes[name].shape) if name in shapes else 'missing'}, the plan says {want}",
                fix="pass small = plan.apply(model), before fusing",
            )
