"""check_finite(...): outputs of the cut that are no numbers, told apart from those that the original does not give either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.messages import where
from surgeon.proof.reference import Reference, Value


class OverflowsError(ProofError):
    """An output holds no finite number."""


def check_finite(
    reference: Sequence[tuple[str, Value]],
    plan: Plan,
    again: Callable[[Plan], Reference],
    args: Any,
    kwargs: Any,
) -> None:
    """Refuse outputs that are finite in the original and are not after the cut, and those of which nothing is.

    Args:
        reference: the outputs of the cut.
        again: a reference for another plan.

    Raises:
        ProofError: see above.
    """
    odd = [(path, want) for path, (want, _) in reference if not bool(torch.isfinite(want).all())]
    if not odd:
        return
    whole = {path: want for path, (want, _) in again(dataclasses.replace(plan, kept={})).run(args, kwargs)}
    for path, want in odd:
        before = whole[path]
        if before.shape == want.shape and bool((torch.isfinite(before) & ~torch.isfinite(want)).any()):
            raise _refusal(path, again(plan), args, kwargs)
        if not bool(torch.isfinite(want).any()):
            raise OverflowsError(
                "an output holds no finite number, so nothing can be compared",
                where=f"output '{path}'",
                why="it overflows in the original as well",
                fix="pass example_inputs for which the model gives numbers",
            )


def _refusal(path: str, run: Reference, args: Any, kwargs: Any) -> ProofError:
    found: list[str] = []

    def look(node: Any, data: Tensor) -> None:
        if not found and bool(torch.isnan(data).any()):
            found.append(where(node))

    run.watch = look
    run.run(args, kwargs)
    return ProofError(
        "an output of the small model is no number where the original gives one",
        where="; ".join((*found, f"output '{path}'")),
        why="too little is left of a dim for what the op computes of it (a variance takes two entries)",
        fix="keep more: min_channels=2, a smaller ratio, or ignore=[...] for the layer",
    )
