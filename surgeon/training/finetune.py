"""finetune(small, train, ...) -> Training: train a model after a cut, with what is known to win accuracy
back.

A convenience: each part (losses, clipping, schedules, moving average, regularizers) also works in your own
loop.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from surgeon.errors import InputError
from surgeon.graph.given import MODEL, check_given
from surgeon.training.batches import check_batches, count
from surgeon.training.evaluate import accuracy
from surgeon.training.loop import Epoch, Loop
from surgeon.training.losses import Distillation
from surgeon.training.optimization import SCHEDULES, Average, Clip, Schedule, clipper
from surgeon.training.penalty import Regularizer
from surgeon.training.processes import Processes

PRECISIONS = ("no", "bf16", "fp16")


@dataclasses.dataclass
class Training:
    """What `finetune` did.

    Attributes:
        model: the model that was passed, trained, in eval mode.
        history: one `Epoch` for each: number, loss, accuracy, rate, score.
        epoch: the one after which the model had the weights that it now has.
        stopped: why it ended before the last epoch, "" if it did not.
    """

    model: nn.Module
    history: list[Epoch]
    epoch: int
    stopped: str = ""


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    *,
    epochs: int = 10,
    steps: int | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    rate: float = 1e-3,
    schedule: str | Schedule = "cosine",
    warmup: int = 0,
    clip: Clip | None = None,
    regularizer: Regularizer | None = None,
    average: float | None = None,
    precision: str | None = None,
    frozen_statistics: bool = False,
    evaluate: Callable[[nn.Module], float] | Iterable[Any] | None = None,
    patience: int | None = None,
    keep: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int | None = None,
    seed: int = 0,
) -> Training:
    """Train a model in place; on a GPU if there is one, on several if `accelerate launch` or `torchrun`
    started several processes.

        done = surgeon.finetune(small, train, teacher=model, epochs=20, clip=("norm", 1.0), evaluate=held_out)

    Args:
        model: what `shrink` or `Plan.apply` gave, or any other.
        train: batches, read once in each epoch: a DataLoader, a list, ... of pairs (inputs, targets), or of
            inputs alone where targets are not needed (inputs that are two tensors then need to be a dict).
            Inputs: a tensor, a tuple or list (positional) or a dict (keywords). Several processes share them:
            each takes every n-th batch.
        epochs: passes over `train`. steps: batches of a pass (for one process), for data without a length.
        loss: (output, targets) -> a number. By default cross-entropy of the logits with the targets, if there
            are any.
        teacher: imitated as `distillation` says (by default temperature 4, weight 0.9); usually the original
            model.
        optimizer: of this model (the one that went through `Plan.apply`, say), or a callable: parameters ->
            optimizer. By default AdamW with `rate` and weight decay 0.01.
        schedule: "cosine", "step", "constant", or a callable: step -> factor of the rate. warmup: steps of a
            linear rise.
        clip: gradients: ("norm", limit), ("value", limit), ("adaptive", limit), or a callable (parameters) ->
            None.
        regularizer: what `surgeon.regularizer` made of this model; its gradients are clipped together with
            the loss's.
        average: decay of a moving average of the weights (0.999, say), which is then what is evaluated and
            kept.
        precision: "no", "bf16" or "fp16" (on GPUs); by default what `accelerate launch` says, else "no".
            Weights stay as they are.
        frozen_statistics: batch norms keep the mean and variance that they have, and train with them: without
            the noise of small batches, and with the very function that the model computes in use. Their
            scales and biases are trained. Nothing scales a layer's outputs back then: expect to need a lower
            rate.
        evaluate: after each epoch: batches of pairs (inputs, class indices) -> accuracy, or a callable: model
            -> number, higher is better. Every process computes it; the main one's counts.
        patience: stop after so many epochs without a better score.
        keep: "best" (by score; the default with `evaluate`) or "last": the weights that the model ends with.
        checkpoint: a file, written after each epoch and each `checkpoint_steps` batches. If it is there,
            training goes on from it: in one process on the CPU to the very weights that an uninterrupted run
            gives.
        seed: of everything random. Python's, numpy's and torch's generators are seeded for each epoch and put
            back at the end.

    Raises:
        InputError: an argument is bad, a batch does not fit, the loss is not finite (with the step), the
            teacher's output has another shape, or the checkpoint is damaged or one of another model, plan or
            run.
        MissingExtraError: accelerate is not installed (extra "train").
    """
    check_given("surgeon.finetune(model, train)", model=(model, MODEL))
    if teacher is not None:
        check_given("surgeon.finetune(model, train, teacher=original)", teacher=(teacher, MODEL))
    check_batches(train, "train")
    for name, number in (("epochs", epochs), ("patience", patience), ("checkpoint_steps", checkpoint_steps)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise InputError(f"{name} must be a positive whole number, got {number!r}")
    if distillation is not None and teacher is None:
        raise InputError("distillation needs a teacher", fix="pass teacher=..., usually the original model")
    keep = keep or ("last" if evaluate is None else "best")
    if keep not in ("best", "last"):
        raise InputError(f"unknown keep={keep!r}", fix="use 'best' or 'last'")
    if evaluate is None and (keep == "best" or patience is not None):
        raise InputError("the best weights and an early stop need a score", fix="pass evaluate=...")
    if evaluate is not None and not callable(evaluate):
        check_batches(evaluate, "evaluate")
    if checkpoint_steps is not None and checkpoint is None:
        raise InputError("checkpoint_steps needs a file", fix="pass checkpoint=...")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if frozen_statistics and not norms:
        raise InputError(
            "the model has no batch norm whose statistics could be frozen", fix="leave frozen_statistics out"
        )
    if regularizer is not None and not regularizer.covers(model):
        raise InputError(
            "the regularizer is one of another model",
            why="a cut, like a copy, makes new parameters",
            fix="make it of this one: surgeon.regularizer(surgeon.inspect(model, ...), ...)",
        )
    clip_gradients = clipper(clip)
    processes = Processes()
    precision = precision or processes.precision
    if precision not in PRECISIONS or (precision == "fp16" and processes.device.type != "cuda"):
        raise InputError(
            f"precision {precision!r} cannot be used on {processes.device.type}",
            fix="use 'no' or 'bf16'; 'fp16' on GPUs",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no parameter that takes gradients", fix="model.requires_grad_(True)")
    model.to(processes.device)
    if regularizer is not None:
        regularizer.to(processes.device)
    batches = processes.sharded(train)
    length = count(batches if isinstance(batches, DataLoader) else train, steps, processes.count)
    loop = Loop(
        model=model,
        batches=batches,
        length=length,
        epochs=epochs,
        loss=loss,
        teacher=teacher,
        distillation=distillation or Distillation(),
        optimizer=_optimizer(optimizer, model, rate),
        factor=_factor(schedule, warmup, epochs * length),
        clip=clip_gradients,
        regularizer=regularizer,
        average=None if average is None else Average(model, average),
        precision=precision,
        frozen=norms if frozen_statistics else [],
        score=_scoring(evaluate),
        patience=patience,
        keep=keep,
        checkpoint=checkpoint,
        checkpoint_steps=checkpoint_steps,
        seed=seed,
        processes=processes,
    )
    loop.run()
    return Training(model, loop.history, loop.epoch_kept, loop.stopped)


def _optimizer(given: Any, model: nn.Module, rate: float) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if given is None:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise InputError(f"rate must be a positive number, got {rate!r}")
        return AdamW(parameters, lr=rate, weight_decay=0.01)
    found = given if isinstance(given, Optimizer) or not callable(given) else given(parameters)
    if not isinstance(found, Optimizer):
        raise InputError(
            f"optimizer is a {type(found).__name__}",
            fix="pass a torch optimizer, or a callable that makes one",
        )
    known = {id(parameter) for parameter in parameters}
    if not any(id(parameter) in known for group in found.param_groups for parameter in group["params"]):
        raise InputError(
            "the optimizer holds no parameter of the model",
            why="a cut makes new parameters",
            fix="cut with plan.apply(model, optimizer=optimizer), or make the optimizer of the small model",
        )
    return found


def _factor(schedule: str | Schedule, warmup: int, steps: int) -> Schedule:
    if callable(schedule):
        if warmup:
            raise InputError("a schedule of your own says its warm-up itself", fix="leave warmup out")
        return schedule
    if schedule not in SCHEDULES:
        raise InputError(
            f"unknown schedule {schedule!r}", fix=f"use one of {', '.join(SCHEDULES)}, or a callable"
        )
    return SCHEDULES[schedule](steps, warmup)


def _scoring(
    evaluate: Callable[[nn.Module], float] | Iterable[Any] | None,
) -> Callable[[nn.Module], float] | None:
    if evaluate is None or callable(evaluate):
        return evaluate
    return lambda model: accuracy(model, evaluate)


__all__ = ["Epoch", "Training", "finetune"]
