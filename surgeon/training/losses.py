"""What a model learns from: targets, a teacher's outputs, a teacher's features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import InputError
from surgeon.graph.tensors import tensor_leaves
from surgeon.training.features import Features


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher (Hinton et al., Distilling the Knowledge in a Neural Network,
    2015).

    The loss is (1 - weight) * task + weight * `soft_targets` + feature_weight * `features.loss()`; without
    targets there is no task loss and soft targets count whole.

    Attributes:
        temperature: of both softmaxes; higher shows more of the teacher's second thoughts.
        weight: of the soft targets, in [0, 1].
        dim: of the classes in the logits; -1 for language models.
        features: of the blocks or of named modules (see `Features`), or None.
        feature_weight: of their loss, which is a sum over modules.
        feature_epochs: so many first epochs learn from features alone (FitNets; Romero et al., 2015).
    """

    temperature: float = 4.0
    weight: float = 0.9
    dim: int = 1
    features: Features | None = None
    feature_weight: float = 1.0
    feature_epochs: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.weight <= 1 or not self.feature_weight >= 0:
            raise InputError(
                f"temperature {self.temperature!r}, weight {self.weight!r} and feature_weight {self.feature_weight!r} do not fit",
                fix="use temperature > 0, weight in [0, 1] and feature_weight >= 0",
            )
        if self.feature_epochs < 0 or (self.feature_epochs and self.features is None):
            raise InputError(
                f"feature_epochs={self.feature_epochs!r} needs features=Features(...) and a number >= 0"
            )


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0, dim: int = 1) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over all samples and positions (Hinton et
    al., 2015).

    T^2 keeps the gradients' size as T changes.

    Args:
        student, teacher: logits of one shape, with the classes along `dim`.

    Raises:
        InputError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"the teacher's output has shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}",
            fix="use the original model as the teacher, or another one with the same classes",
        )
    ours, theirs = (F.log_softmax(t.float() / temperature, dim) for t in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim).mean() * temperature**2


def stated_logits(output: Any) -> Tensor | None:
    """The output itself, or its `logits`, if it is or has one."""
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def logits(output: Any) -> Tensor:
    """The logits of a model's output: the output itself, its `logits`, or its only float tensor.

    Raises:
        InputError: it is not clear which tensor is meant.
    """
    found = stated_logits(output)
    if found is not None:
        return found
    floats = [(path, tensor) for path, tensor in tensor_leaves(output) if tensor.is_floating_point()]
    if len(floats) != 1:
        raise InputError(
            f"cannot tell which of the model's {len(floats)} float outputs are the logits",
            where=", ".join(path for path, _ in floats[:10]),
            fix="wrap the model so that it returns one tensor, or a dict with 'logits'",
        )
    return floats[0][1]
