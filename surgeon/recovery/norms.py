"""Batch-norm re-estimation: what each batch norm subtracts and divides by, anew from the small model's own
activations.

Both models run side by side, so that each norm sees its input as it is with all norms before it set; in eval mode, so that
batches of any size do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph
from surgeon.ops.table import Trait, has, op_name
from surgeon.recovery.layerwise import Pass
from surgeon.recovery.runs.paired_run import twin
from surgeon.recovery.runs.recording import Progress, Recording, distance


def statistics(graph: Graph) -> list[tuple[fx.Node, str, str]]:
    """The batch norms that use running statistics: op, names of its mean and its variance."""
    found = []
    for node in graph.fx.nodes:
        if node.op != "call_function" or not has(op_name(node), Trait.BATCH_NORM):
            continue
        held = (arguments(node)[name] for name in ("running_mean", "running_var"))
        names = [str(item.target) for item in held if isinstance(item, fx.Node) and item.op == "get_attr"]
        if len(names) == 2 and all(name in graph.owned for name in names):
            found.append((node, names[0], names[1]))
    return found


@torch.no_grad()
def reestimate(recording: Recording, track: Progress) -> Pass:
    """Set the running mean and variance (unbiased, as torch keeps it) of every batch norm from the batches
    learned from.
    """
    pairs = recording.pairs()
    tensors = recording.small.tensors
    peak = 0
    for node, mean_name, var_name in track(statistics(recording.small), "batch_norm"):
        total, square, count = torch.zeros(()), torch.zeros(()), 0
        for pair in pairs:
            own = twin(node, pairs[0].small, pair.small)
            pair.small.before(own)
            given: Any = arguments(own)["input"]
            x: Tensor = pair.small.value(given).double()
            if not pair.held:
                flat = x.movedim(1, 0).flatten(1) if x.dim() > 1 else x[None]
                total = total.to(flat) + flat.sum(1)
                square = square.to(flat) + flat.square().sum(1)
                count += flat.shape[1]
        mean = total / count
        var = (square / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        for name, value in ((mean_name, mean), (var_name, var)):
            tensors[name].copy_(value)
        peak = max(peak, sum(pair.small.bytes for pair in pairs))
    return Pass([], distance(pair for pair in pairs if pair.held), peak)
