"""Objective: what one batch costs: the task's loss, the teacher's outputs and features."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.capture.batches import described, one_number
from surgeon.errors import InputError
from surgeon.training.batches import run, split
from surgeon.training.evaluate import hits, in_eval_mode
from surgeon.training.losses import Distillation, logits, soft_targets

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The loss of a batch, and (right, all) of its class predictions."""

    loss: Tensor
    hits: tuple[int, int]


class Objective:
    """(model, batch) -> cost; the teacher, if there is one, runs inside `ready()`."""

    def __init__(
        self,
        student: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        teacher: nn.Module | None,
        distillation: Distillation,
        precision: str,
        device: torch.device,
    ) -> None:
        self.student, self.loss, self.teacher, self.distillation = student, loss, teacher, distillation
        self.precision, self.device = precision, device

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The teacher is on the device, in eval mode, and its features are seen; all of it is put back."""
        with contextlib.ExitStack() as stack:
            if self.teacher is not None:
                home = next((tensor.device for tensor in self.teacher.parameters()), self.device)
                if home != self.device:
                    self.teacher.to(self.device)
                    stack.callback(self.teacher.to, home)
                stack.enter_context(in_eval_mode(self.teacher))
                if self.distillation.features is not None:
                    stack.enter_context(self.distillation.features.watching(self.student, self.teacher))
            yield

    def __call__(self, model: nn.Module, batch: Any, label: str, features_only: bool = False) -> Cost:
        inputs, targets = split(batch)
        with torch.autocast(self.device.type, _DTYPES.get(self.precision), enabled=self.precision != "no"):
            output = run(model, inputs, label)
            if self.teacher is None:
                value = self._task(output, targets, label)
            else:
                value = self._distilled(output, targets, inputs, label, features_only)
        return Cost(value, hits(output, targets))

    def _distilled(self, output: Any, targets: Any, inputs: Any, label: str, features_only: bool) -> Tensor:
        assert self.teacher is not None
        rule = self.distillation
        with torch.no_grad():
            theirs = run(self.teacher, inputs, f"{label} (the teacher)")
        parts = []
        if rule.features is not None:
            parts.append(rule.feature_weight * rule.features.loss())
        if features_only:
            parts.append(logits(output).sum() * 0)  # several processes wait for a gradient of every parameter
        else:
            has_task = self.loss is not None or targets is not None
            if has_task and rule.weight < 1:
                parts.append((1 - rule.weight) * self._task(output, targets, label))
            soft = soft_targets(logits(output), logits(theirs), rule.temperature, rule.dim)
            parts.append((rule.weight if has_task else 1.0) * soft)
        return torch.stack(parts).sum()

    def _task(self, output: Any, targets: Any, label: str) -> Tensor:
        if self.loss is None and targets is None:
            raise InputError(
                f"{label} has no targets",
                why="without a teacher or a loss of your own, the loss is the cross-entropy with class indices",
                fix="let train yield pairs (inputs, targets), or pass teacher=... or loss=...",
            )
        return one_number(
            lambda: (
                F.cross_entropy(logits(output), targets) if self.loss is None else self.loss(output, targets)
            ),
            label,
            why=f"output: {described(output)}; targets: {described(targets)}",
        )
