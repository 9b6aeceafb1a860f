"""What benchmarks/accuracy/recover.py measures in one go, in which order, and the cache of what was measured."""

from __future__ import annotations

import dataclasses
from functools import partial

from benchmarks.accuracy.recover_tasks import TASKS
from benchmarks.lib.cifar_data import MODELS
from benchmarks.lib.results import RESULTS, Rows, keep, kept

REDUCTIONS = {name: (1.5, 2.1, 2.6) if name in MODELS else (1.5, 2.1) for name in TASKS}
METHODS = {  # of each tool
    "torch-pruning": ("torch-pruning as cut", "torch-pruning + BN", "torch-pruning + BN, distilled"),
    "surgeon": ("surgeon as cut", "surgeon recovered", "surgeon distilled"),
    "base": ("base", "base"),
}
Cells = Rows


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured in one go: before training all methods of a tool, after it one of them."""

    model: str
    reduction: float
    seed: int
    tool: str
    epochs: int
    recipe: str = ""  # of the training
    start: int = 1  # of the training: which of the tool's methods

    @property
    def keys(self) -> dict[str, str]:
        """Method -> its key in the cache."""
        trained = f" of {self.recipe}" if self.epochs else ""
        methods = METHODS[self.tool][self.start :][:1] if self.epochs else METHODS[self.tool]
        return {m: f"{self.model} {self.reduction:g} {self.seed} {m} {self.epochs}{trained}" for m in methods}

    @property
    def urgency(self) -> tuple[int, ...]:
        """What is done first is the least."""
        if not self.epochs:
            return (int(self.model not in MODELS), list(TASKS).index(self.model), self.seed)
        place = {2.1: 2, 1.0: 3}.get(self.reduction, 4)
        return (
            place,
            self.seed,
            list(TASKS).index(self.model),
            list(METHODS).index(self.tool),
            self.epochs,
            1 - self.start,
        )


load_cells = partial(kept, "recover", folder=RESULTS)
keep_cells = partial(keep, "recover", folder=RESULTS)
