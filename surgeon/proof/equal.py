"""check_equal(model, small, graph) -> error: whether two models give the same outputs, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.graph import Graph
from surgeon.graph.nests import map_tensors
from surgeon.ops.masked_op import wide
from surgeon.proof.drawn import drawn
from surgeon.proof.reference import TOLERANCE, Reference, distance
from surgeon.proof.small_run import run_small


def check_equal(model: nn.Module, small: nn.Module, graph: Graph, exact: Mapping[str, Tensor]) -> float:
    """The largest relative difference of the outputs, on random inputs if the model's code reads no values.

    Args:
        graph: a recorded run of `model`.
        exact: numbers to take in place of those of some of the small model's tensors, which are rounded.

    Raises:
        ProofError: an output differs by more than 1e-9.
    """
    decided = any("decision" in node.meta for node in graph.fx.nodes)  # the same inputs, the same decisions
    recorded = map_tensors((graph.args, dict(graph.kwargs)), lambda tensor: wide(tensor.detach()))
    args, kwargs = recorded if decided else drawn(graph)
    outputs, _, constants = run_small(small, graph, args, kwargs, False, exact)
    whole = Plan(kept={}, hash=graph.hash, macs=0, params=0, macs_before=0, params_before=0)
    with torch.no_grad():
        wanted = Reference(model, graph, whole, {}, {}, constants).run(args, kwargs)
    errors = {
        path: distance(path, want, mask, got)
        for (path, (want, mask)), (_, got) in zip(wanted, outputs, strict=True)
    }
    worst = max(errors, key=lambda path: errors[path])
    if errors[worst] > TOLERANCE:
        raise ProofError(
            f"the small model computes something else: relative error {errors[worst]:.2e} (allowed {TOLERANCE:.0e})",
            where=f"output '{worst}'{graph.label}",
            why="what left was not without effect",
            fix="please report the model: this is a bug in surgeon",
        )
    return errors[worst]
