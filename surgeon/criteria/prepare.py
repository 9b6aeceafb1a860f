"""Criteria: a group and the model's tensors -> one score per unit, low scores leave first.

A criterion is any callable `(group, tensors) -> array of group.units scores`. `criterion(name)` finds a
built-in one; `prepare` also gathers what it needs from data. `docs/criteria.md` lists them. To add one, write
a class in the file of its family, and name it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgeon.coupling.groups import Group
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.criteria import activation, gradient, kfac, magnitude, second_order, similarity  # noqa: F401  # named
from surgeon.criteria.combine import Combined, Criterion
from surgeon.criteria.data.gather import WIDEST, Loss, gather
from surgeon.criteria.measured import Measured
from surgeon.criteria.names import BUILT_IN
from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.ops.ids import DimIds


def criterion(which: str | Criterion, seed: int = 0) -> Criterion:
    """A built-in criterion by name, or the callable itself. Those that look at data must be prepared before
    they are called.

    Raises:
        InputError: no criterion has that name; the known ones are listed.
    """
    if callable(which):
        return which
    if which not in BUILT_IN:
        plain = sorted(name for name in BUILT_IN if not looks_at_data(name))
        others = sorted(BUILT_IN.keys() - set(plain))
        raise InputError(
            f"unknown criterion {which!r}",
            fix=f"use one of {', '.join(plain)}; with data=... also {', '.join(others)}; or a callable",
        )
    return BUILT_IN[which](seed)


def looks_at_data(which: str | Criterion) -> bool:
    """Whether a criterion needs batches that it has not been shown yet."""
    found = criterion(which)
    return isinstance(found, Measured) and not found.is_informed


def prepare(
    which: str | Criterion,
    *,
    seed: int = 0,
    model: nn.Module,
    graph: Graph,
    propagation: Propagation,
    solution: Solution,
    groups: Sequence[Group],
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Criterion:
    """A criterion that can be called: found by name, with evidence from the data if it needs any. An object
    is not changed.

    Args:
        data: an iterable of batches, read once (see `calibration.gather`). Not read if the criterion needs
            none.
        loss: `loss(output, targets)`; a batch is then a pair (inputs, targets).

    Raises:
        InputError: no criterion has that name; it needs data and there is none; the data cannot be used.
    """
    found = criterion(which, seed)
    if isinstance(found, Measured):
        if data is None and found.is_informed:
            return found
        if data is None:
            raise found.without_data()
        options: Any = {"data": data, "loss": loss, "widest": getattr(found, "widest", WIDEST)}
        options |= {
            "model": model,
            "graph": graph,
            "propagation": propagation,
            "solution": solution,
            "groups": groups,
        }
        return found.informed(gather(found.needs, **options))
    return found.fresh() if isinstance(found, Combined) else found


def scores(which: Criterion, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
    """The criterion's scores as a float64 array [sets, steps], checked.

    Raises:
        InputError: wrong length, or a score that is NaN or infinite.
    """
    found = np.asarray(which(group, tensors), dtype=np.float64)
    if found.shape != (group.units,):
        raise InputError(
            f"the criterion gave scores of shape {found.shape} for a group of {group.units} units",
            where=group.name,
            fix="return one score per unit, as a 1-d array or tensor of length group.units",
        )
    if not np.isfinite(found).all():
        raise InputError(
            "the criterion gave a score that is NaN or infinite",
            where=group.name,
            why="the weights hold NaN or inf, or the criterion divides by zero",
            fix="repair the weights (see torch.isfinite) or the criterion",
        )
    return found.reshape(group.sets.shape)
