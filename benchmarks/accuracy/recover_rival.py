"""torch-pruning at given MACs: each of its criteria, locally and globally, with the residual stream and
without.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from benchmarks.accuracy.recover_tasks import Task
from benchmarks.lib.results import first_line
from benchmarks.lib.rivals import heads_of, repair

IMPORTANCES = {
    "L1": lambda tp: tp.importance.GroupMagnitudeImportance(p=1),
    "L2": lambda tp: tp.importance.GroupMagnitudeImportance(p=2),
    "BN scale": lambda tp: tp.importance.BNScaleImportance(),
    "Taylor": lambda tp: tp.importance.GroupTaylorImportance(),
}
STEPS, CLOSE = 10, 0.995  # of the search for a ratio; what of the target ends it


@dataclasses.dataclass(frozen=True)
class Choice:
    """How torch-pruning is called; inner: outputs that the residual stream holds are ignored."""

    importance: str
    everywhere: bool
    inner: bool
    ratio: float

    def __str__(self) -> str:
        return f"{self.importance}, {'global' if self.everywhere else 'uniform'}, {'inner' if self.inner else 'all'} channels"


def macs_of(model: nn.Module, x: Tensor) -> int:
    """MACs of products and convolutions, as torch counts them: one counter for every tool."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def reestimated(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy whose batch norms have the means and variances of the data."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    with torch.no_grad():
        for x, _ in data:
            model(x)
    return model.eval()


def plan_of(task: Task, small: nn.Module) -> surgeon.Plan:
    """Surgeon's plan of the inner channels that torch-pruning left, found by their filters: for what takes a
    plan.

    Raises:
        ValueError: it is not what was cut.
    """
    left = {
        name: filters
        for name, filters in small.named_parameters()
        if task.inner(name.removesuffix(".weight"))
    }
    stays, ratios = {}, {"*": 0.0}
    for name, filters in left.items():
        whole = task.base.get_parameter(name)
        stays[name] = torch.tensor([any(torch.equal(row, kept) for kept in filters) for row in whole])
        ratios[name.removesuffix(".weight")] = 1 - len(filters) / len(whole)

    def criterion(group: Any, _: Any) -> Tensor:
        scores = torch.zeros(group.units)
        for member in group.members:
            if member.tensor in stays and member.dim == 0:
                scores[torch.from_numpy(member.unit)] = stays[member.tensor][
                    torch.from_numpy(member.index)
                ].float()
        return scores

    plan = surgeon.inspect(task.base, task.calibration(0)[0][0][:1]).plan(
        ratios, criterion=criterion, round_to=1
    )
    for (name, ours), theirs in zip(
        plan.apply(task.base).named_parameters(), small.parameters(), strict=True
    ):
        if not torch.equal(ours, theirs):
            raise ValueError(f"{name} is not what torch-pruning left")
    return plan


class Rival:
    """torch-pruning on one network and calibration set, whose labels it may use."""

    def __init__(self, task: Task, seed: int) -> None:
        import torch_pruning

        self.tp: Any = torch_pruning
        self.task, self.data = task, task.calibration(seed)
        self.example = self.data[0][0][:1]
        self.whole = macs_of(task.base, self.example)
        self.norms = any(isinstance(module, nn.BatchNorm2d) for module in task.base.modules())
        self.gradients = self._gradients()

    def _gradients(self) -> dict[str, Tensor]:
        """Of the mean loss over the calibration set."""
        model = copy.deepcopy(self.task.base)
        for x, y in self.data:
            (self.task.loss(model(x), y) / len(self.data)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def candidates(self, share: float) -> Iterator[tuple[Choice, nn.Module] | str]:
        """The largest model within a share of the MACs for each way to call it, or why there is none."""
        for importance in IMPORTANCES:
            if importance == "BN scale" and not self.norms:
                continue
            for everywhere in (False, True):
                for inner in (False, True) if self.task.stream else (True,):
                    try:
                        yield self._fitted(Choice(importance, everywhere, inner, 1.0), share)
                    except Exception as error:  # noqa: BLE001  # whatever the rival raises is said in the notes
                        yield f"{Choice(importance, everywhere, inner, 1.0)}: {first_line(error)}"

    def _fitted(self, choice: Choice, share: float) -> tuple[Choice, nn.Module]:
        low, high = 0.0, 0.98
        best: tuple[Choice, nn.Module] | None = None
        for _ in range(STEPS):
            choice = dataclasses.replace(choice, ratio=(low + high) / 2)
            small = self.cut(choice)
            reached = macs_of(small, self.example) / (share * self.whole)
            if reached <= 1:
                best, high = (choice, small), choice.ratio
                if reached > CLOSE:
                    break
            else:
                low = choice.ratio
        if best is None:
            raise ValueError("no ratio meets the budget")
        return best

    def cut(self, choice: Choice) -> nn.Module:
        """What torch-pruning makes of a copy of the base."""
        small = copy.deepcopy(self.task.base)
        for name, p in small.named_parameters():
            p.grad = self.gradients[name].clone()
        modules = dict(small.named_modules())
        last = [module for module in modules.values() if isinstance(module, nn.Linear)][-1:]
        stream = [
            m
            for name, m in modules.items()
            if isinstance(m, nn.Conv2d | nn.Linear) and not self.task.inner(name)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self.tp.pruner.BasePruner(
                small,
                self.example,
                IMPORTANCES[choice.importance](self.tp),
                pruning_ratio=choice.ratio,
                global_pruning=choice.everywhere,
                ignored_layers=[*last, *(stream if choice.inner else [])],
                num_heads=heads_of(small),
            )
            pruner.step()
        small.zero_grad()
        repair(small)
        return small.eval()
