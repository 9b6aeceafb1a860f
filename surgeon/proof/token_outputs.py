"""compare_tokens(model, small, ...) -> error: the outputs of a model with fewer ids, for those that it kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.model_state import output_of, quiet_run
from surgeon.errors import ProofError
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.graph import Graph
from surgeon.graph.nests import map_tensors
from surgeon.graph.tensors import tensor_leaves
from surgeon.proof.reference import TOLERANCE


def compare_tokens(
    model: nn.Module,
    small: nn.Module,
    graph: Graph,
    fed: Collection[fx.Node],
    rows: int,
    new: Mapping[int, int],
) -> float:
    """The largest relative difference of the outputs for kept ids, in float64.

    Args:
        fed: the inputs that are ids.
        rows: how many ids there were; new: old id -> new id, of all that stay.

    Raises:
        ProofError: it is more than 1e-9, or outputs have other shapes.
    """
    leaves = list(
        {id(tensor): tensor for _, tensor in tensor_leaves((graph.args, dict(graph.kwargs)))}.values()
    )
    tokens = {id(tensor) for tensor, (_, node) in zip(leaves, graph.inputs, strict=True) if node in fed}
    old, generator = torch.tensor(list(new)), torch.Generator().manual_seed(0)
    drawn: dict[int, Tensor] = {}

    def inputs(mapped: bool) -> Any:
        def one(tensor: Tensor) -> Tensor:
            if id(tensor) not in tokens:
                return tensor.double() if tensor.is_floating_point() else tensor
            if id(tensor) not in drawn:
                drawn[id(tensor)] = torch.randint(len(old), tensor.shape, generator=generator)
            places = drawn[id(tensor)]
            return (places if mapped else old[places]).to(tensor.device, tensor.dtype)

        return map_tensors((graph.args, dict(graph.kwargs)), one)

    found = []
    for module, mapped in ((model, False), (small, True)):
        twin = copied(module).double().eval()
        args, kwargs = inputs(mapped)
        with torch.no_grad(), quiet_run(twin, seed=0):
            found.append(tensor_leaves(output_of(twin, args, kwargs)))
    worst = 0.0
    for (path, want), (_, got) in zip(*found, strict=True):
        for dim, (before, after) in enumerate(zip(want.shape, got.shape, strict=True)):
            if before == rows != after:
                want = want.index_select(dim, old.to(want.device))
        if want.shape != got.shape:
            raise ProofError(
                f"an output has shape {tuple(got.shape)} instead of {tuple(want.shape)}", where=f"output '{path}'",
                why="it does not follow the number of ids", fix="name the tables that belong together: tables=[...]",
            )  # fmt: skip
        gap = float((want.double() - got.double()).abs().max()) if want.numel() else 0.0
        scale = float(want.double().abs().max()) if want.numel() else 1.0
        worst = max(worst, gap / scale if scale else gap)
        if not worst <= TOLERANCE:
            raise ProofError(
                f"outputs for kept ids differ by {worst:.1e} (allowed {TOLERANCE:.0e})",
                where=f"output '{path}'",
                why="the model's code looks at single ids, or several tables belong together",
                fix="keep the ids that its code names, and name all tables: tables=[...]",
            )
    return worst
