"""The loop of `finetune`: epochs and steps, what is kept of them, and how a run that was killed goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgeon.errors import InputError
from surgeon.training.batches import placed, seed_all
from surgeon.training.checkpoints import (
    check_progress,
    identity_of,
    load_checkpoint,
    random_states,
    restore_random_states,
    restoring,
    save_checkpoint,
)
from surgeon.training.evaluate import in_eval_mode
from surgeon.training.losses import Distillation
from surgeon.training.objective import Objective
from surgeon.training.optimization import Average, Schedule
from surgeon.training.penalty import Regularizer
from surgeon.training.processes import Processes

Tell = Callable[[int, str], None]  # of a progress bar: steps done, and a text


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch: its number from 1, mean loss, share of right classes (None where that has no meaning), the
    learning rate of the first group at its end, and the score of the weights after it (None without
    `evaluate`)."""

    number: int
    loss: float
    accuracy: float | None
    rate: float
    score: float | None


@dataclasses.dataclass
class Loop:
    """See `finetune` for what the fields mean; `length` batches make an epoch of this process; `frozen` stay
    in eval mode.
    """

    model: nn.Module
    batches: Iterable[Any]
    length: int
    epochs: int
    loss: Callable[[Any, Any], Tensor] | None
    teacher: nn.Module | None
    distillation: Distillation
    optimizer: Optimizer
    factor: Schedule
    clip: Callable[[list[nn.Parameter]], object] | None
    regularizer: Regularizer | None
    average: Average | None
    precision: str
    frozen: Sequence[nn.Module]
    score: Callable[[nn.Module], float] | None
    patience: int | None
    keep: str
    checkpoint: str | os.PathLike[str] | None
    checkpoint_steps: int | None
    seed: int
    processes: Processes
    history: list[Epoch] = dataclasses.field(default_factory=list)
    stopped: str = ""
    epoch_kept: int = 0

    def __post_init__(self) -> None:
        self._done = 0  # batches of the current epoch
        self._sums = [0.0, 0.0, 0.0, 0.0]  # of losses, batches, right classes, classes
        self._random: dict[str, Any] = {}
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.regularizer is not None:
            self._adopt(self.regularizer)
        self._schedule = LambdaLR(self.optimizer, self.factor)
        self._scaler = torch.amp.GradScaler(self.processes.device.type, enabled=self.precision == "fp16")
        total = self.epochs * self.length
        self._identity = {
            **identity_of(self.model), "epochs": self.epochs, "batches": self.length, "seed": self.seed,
            "processes": self.processes.count, "optimizer": type(self.optimizer).__name__, "precision": self.precision,
            "rates": [float(group["initial_lr"]) for group in self.optimizer.param_groups],
            "schedule at start, middle and end": [float(self.factor(step)) for step in (0, total // 2, total - 1)],
            "frozen statistics": bool(self.frozen),
            "average": None if self.average is None else self.average.decay,
            "regularizer": None if self.regularizer is None else type(self.regularizer).__name__,
        }  # fmt: skip

    def _adopt(self, regularizer: Regularizer) -> None:
        """Let the optimizer step the regularizer's own parameters, unless it does already."""
        known = {id(p) for p in self._parameters}
        own = [p for p in regularizer.parameters() if id(p) not in known]
        if own:
            named = "param_names" in self.optimizer.param_groups[0]  # then all groups must have names
            members: list[Any] = [(f"regularizer.{i}", p) for i, p in enumerate(own)] if named else own
            self.optimizer.add_param_group({"params": members, **regularizer.group_options})

    def run(self) -> None:
        """All epochs that are left."""
        outside = random_states()
        objective = Objective(
            self.model, self.loss, self.teacher, self.distillation, self.precision, self.processes.device
        )
        try:
            if self.checkpoint is not None and os.path.exists(self.checkpoint):
                state = load_checkpoint(self.checkpoint, self._identity)
                with restoring(self.checkpoint):
                    self._load(state)
            wrapped = self.processes.wrapped(self.model)
            with objective.ready(), progress_bar(self.epochs * self.length, self.processes.is_main) as tell:
                while len(self.history) < self.epochs and not self.stopped:
                    self._epoch(wrapped, objective, tell)
        finally:
            restore_random_states(outside)
            self.model.zero_grad()
            self.model.eval()
        self._settle()

    def _epoch(self, wrapped: nn.Module, objective: Objective, tell: Tell) -> None:
        number = len(self.history) + 1
        again = self._done
        seed_all(self.seed * 1_000_003 + number, self.batches)
        wrapped.train()
        for norm in self.frozen:
            norm.eval()
        place = 0
        for place, batch in enumerate(itertools.islice(self.batches, self.length), 1):
            if place <= again:  # of a run that was killed in this epoch: done already
                if place == again:
                    restore_random_states(self._random)
                continue
            self._step(wrapped, objective, batch, number, place)
            self._done = place
            losses, batches, right, total = self._sums
            said = f"epoch {number}, loss {losses / batches:.4f}" + (
                f", accuracy {right / total:.2%}" if total else ""
            )
            tell((number - 1) * self.length + place, said)
            if self.checkpoint_steps and place % self.checkpoint_steps == 0 and place < self.length:
                self._save()
        if place < self.length:
            raise InputError(
                f"train gave {place} batches in epoch {number}, {self.length} were announced",
                fix="pass data that holds batches, can be read again in every epoch, and has as many as steps=... says",
            )
        self._conclude(number)
        self._save()

    def _step(self, wrapped: nn.Module, objective: Objective, batch: Any, epoch: int, place: int) -> None:
        step = (epoch - 1) * self.length + place
        label = f"batch {place} of epoch {epoch}"
        found = objective(
            wrapped,
            placed(batch, self.processes.device),
            label,
            features_only=epoch <= self.distillation.feature_epochs,
        )
        value = found.loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {step} ({label})",
                why="the rate is too high, or inputs, targets or weights are out of range; this step was not taken",
                fix="lower rate=..., warm up, or clip=('norm', 1.0); a checkpoint keeps the last good weights",
            )
        self.optimizer.zero_grad()
        self._scaler.scale(found.loss).backward()
        self._scaler.unscale_(self.optimizer)
        if self.regularizer is not None:
            self.regularizer.step()
        if self.clip is not None:
            self.clip(self._parameters)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        self._sums = [a + b for a, b in zip(self._sums, (value, 1, *found.hits), strict=True)]

    def _conclude(self, number: int) -> None:
        """Sum an epoch up, score it, and see whether it is the best or the last."""
        losses, batches, right, total = self.processes.total(self._sums)
        self._done, self._sums = 0, [0.0, 0.0, 0.0, 0.0]
        rate = float(self.optimizer.param_groups[0]["lr"])
        score = None
        if self.score is not None:
            with self._averaged(), in_eval_mode(self.model), torch.no_grad():
                score = self.processes.of_main(float(self.score(self.model)))
            if not math.isfinite(score):
                raise InputError(
                    f"the score after epoch {number} is {score}", fix="let evaluate give a finite number"
                )
        self.history.append(Epoch(number, losses / batches, right / total if total else None, rate, score))
        if score is not None and (self._best is None or score > self._best[0]):
            with self._averaged():
                self._best = score, _copied(self.model.state_dict()) if self.keep == "best" else {}
            self.epoch_kept = number
        if self.patience is not None and number - self.epoch_kept >= self.patience and number < self.epochs:
            self.stopped = f"no better score for {self.patience} epochs, after epoch {number}"

    def _settle(self) -> None:
        """Give the model the weights that are to be kept."""
        if self.keep == "best" and self._best is not None:
            self.model.load_state_dict(self._best[1])
        else:
            self.epoch_kept = len(self.history)
            if self.average is not None:
                self.model.load_state_dict(self.average.values)
        self.processes.agree(self.model)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.used_by(self.model)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        if self.processes.is_main:
            save_checkpoint(self.checkpoint, self._state(), self._identity)
        self.processes.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self._schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": self._scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "history": [dataclasses.astuple(epoch) for epoch in self.history],
            "kept": (self.epoch_kept, self._best, self.stopped),
            "progress": (self._done, self._sums),
            "random": random_states(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(
            {**state["schedule"], "lr_lambdas": self._schedule.state_dict()["lr_lambdas"]}
        )
        self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        check_progress(state)
        self.history = [Epoch(*epoch) for epoch in state["history"]]
        self.epoch_kept, self._best, self.stopped = state["kept"]
        self._done, self._sums = state["progress"]
        self._random = state["random"]
        restore_random_states(
            self._random
        )  # to see that it can be; every epoch begins with a seed of its own


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """On the CPU, so that the best weights cost no memory of the device."""
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


@contextlib.contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Tell]:
    """Gives a function to call with the steps done and a text."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(
        "fine-tuning", *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as bar:
        task = bar.add_task("", total=total, said="")
        yield lambda done, said: bar.update(task, completed=done, said=said)
