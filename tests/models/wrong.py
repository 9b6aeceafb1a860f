"""Plans that must fail their proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

import surgeon
from surgeon.cut.slice import shrink_module


def wrong_cuts(model: nn.Module, plan: surgeon.Plan) -> Iterator[tuple[nn.Module, surgeon.Plan]]:
    """In each cut slot in turn, one kept index is exchanged for a removed one: the small models, which run,
    and their plans.

    Only the run tells that they are wrong: every tensor holds what its plan says. `plan` must have been
    applied.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, dims in plan.kept.items():
        for dim, kept in dims.items():
            removed = sorted(set(range(tensors[name].shape[dim])) - set(kept))
            wrong = {n: {d: list(k) for d, k in ds.items()} for n, ds in plan.kept.items()}
            wrong[name][dim] = sorted([*kept[1:], removed[0]])
            bad = dataclasses.replace(plan, kept=wrong)
            yield shrink_module(model, bad.kept, bad.edits), bad
