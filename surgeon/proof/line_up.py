"""How the small model's own run lines up with the recorded run of the original, op by op.

What the proof takes from it: the results of contractions to compare, and the numbers in the small model's code
that differ from the original's for a good reason (they are made of widths, or the original's were rounded to
float32)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import torch
import torch.utils._pytree
from torch import Tensor, fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Call, Graph, spec
from surgeon.graph.queries import made_of_numbers, number_in
from surgeon.ops.masked_op import by_default_float64
from surgeon.ops.sums import scales
from surgeon.ops.table import Trait, alike, has, op_name
from surgeon.proof.reference import ROUNDED, Rescaled


@dataclasses.dataclass(frozen=True)
class Step:
    """One op of the small model's run: its name, the numbers among its arguments, its result if it is a
    contraction.

    `within` is the number of the product (see `capture.sizes`) that ran it, 0 if none did.
    """

    name: str
    constants: dict[str, float]
    result: Tensor | None
    within: int


def optional(name: str) -> bool:
    """Whether an op computes nothing: run or not by how a tensor lies in memory."""
    return has(name, Trait.COPIES) or has(name, Trait.INCIDENTAL)


def of_indices(dtypes: list[torch.dtype]) -> bool:
    """Whether an op works on whole numbers alone, or on nothing: code may remember what such ops gave, and
    not run them again.
    """
    return not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    return [spec(n).dtype for n in node.all_input_nodes]


def traced(graph: Graph) -> list[Call]:
    """The recorded ops that a trace holds."""
    return [c for c in graph.calls if not optional(op_name(c.node)) and not of_indices(_dtypes(c.node))]


def line_up(graph: Graph, trace: list[Step]) -> dict[fx.Node, Step]:
    """The steps of the small model's run by the node that they belong to; {} if the runs differ in their ops.

    Products of which torch made other ops are left out.
    """
    found: dict[fx.Node, Step] = {}
    recorded = [list(calls) for _, calls in itertools.groupby(traced(graph), lambda call: call.within)]
    ran = [list(steps) for _, steps in itertools.groupby(trace, lambda step: step.within)]
    if len(recorded) != len(ran):
        return {}
    for calls, steps in zip(recorded, ran, strict=True):
        if len(calls) == len(steps) and all(
            alike(op_name(c.node)) == alike(s.name) for c, s in zip(calls, steps, strict=True)
        ):
            found |= dict(zip((call.node for call in calls), steps, strict=True))
        elif not calls[0].within or calls[0].within != steps[0].within:
            return {}
    return found


def changed_constants(graph: Graph, steps: Mapping[fx.Node, Step]) -> Rescaled:
    """Numbers that scale what an op computes and that differ between the two runs: node -> (place, old, new).

    Whether they may is for the reference to say, which knows what stays of the sums that they scale.
    """
    found: Rescaled = {}
    made = made_of_numbers(graph, by_default_float64)
    for node, step in steps.items():
        given = arguments(node)
        for place, after in step.constants.items():
            before = number_in(given[place], made) if place in given else None
            if before is None or before == after:
                continue
            if math.isclose(before, after, rel_tol=ROUNDED):
                if graph.reads:  # computed outside of torch, of the same values
                    found[node] = (place, before, after)
                continue
            exact = before in _EPSILONS and after == _FINEST  # torch takes the dtype's where none is given
            if exact or scales(op_name(node), place):
                found[node] = (place, before, after)
    return found


_FINEST = torch.finfo(torch.float64).eps


_EPSILONS = {torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
