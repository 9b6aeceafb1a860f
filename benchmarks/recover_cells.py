"""What benchmarks/recover.py measures in one go, in which order, and the cache of what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from cifar import MODELS
from recover_models import CACHE
from recover_tasks import TASKS

CELLS = CACHE / "recover.json"
REDUCTIONS = {name: (1.5, 2.1, 2.6) if name in MODELS else (1.5, 2.1) for name in TASKS}
METHODS = {  # of each tool
    "torch-pruning": ("torch-pruning as cut", "torch-pruning + BN"),
    "surgeon": ("surgeon as cut", "surgeon recovered"),
    "base": ("base", "base"),
}
Cells = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured in one go: before training all methods of a tool, after it the last of them."""

    model: str
    reduction: float
    seed: int
    tool: str
    epochs: int
    recipe: str  # of the training

    @property
    def keys(self) -> dict[str, str]:
        """Method -> its key in the cache."""
        trained = f" of {self.recipe}" if self.epochs else ""
        methods = METHODS[self.tool][1:] if self.epochs else METHODS[self.tool]
        return {m: f"{self.model} {self.reduction:g} {self.seed} {m} {self.epochs}{trained}" for m in methods}

    @property
    def urgency(self) -> tuple[int, ...]:
        """What is done first is the least."""
        if not self.epochs:
            return (int(self.model not in MODELS), list(TASKS).index(self.model), self.seed)
        first = self.reduction == 2.1 and self.seed == 0
        return (2 + list(TASKS).index(self.model) if first else 9, self.epochs, self.seed)


def load_cells() -> Cells:
    found: Cells = json.loads(CELLS.read_text()) if CELLS.is_file() else {}
    return found


def keep(found: Cells, without: Iterable[str] = ()) -> Cells:
    """Add cells to the file, or take some away; what it then holds."""
    gone = set(without)
    cells = {key: cell for key, cell in {**load_cells(), **found}.items() if key not in gone}
    CACHE.mkdir(exist_ok=True)
    CELLS.with_suffix(".new").write_text(json.dumps(cells, indent=1))
    os.replace(CELLS.with_suffix(".new"), CELLS)
    return cells
