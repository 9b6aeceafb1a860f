"""Questions about a recorded graph: what it reads, what ran where, whether its weights are sound."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from surgeon.errors import InputError
from surgeon.graph.graph import Graph


def read_tensors(graph: Graph) -> set[str]:
    """The names of the tensors that the run read."""
    return {str(node.target) for node in graph.fx.find_nodes(op="get_attr")}


def nodes_inside(graph: Graph, path: str) -> list[fx.Node]:
    """The ops that ran in a module or below it."""

    def inside(module: str) -> bool:
        return path == "" or module == path or module.startswith(f"{path}.")

    return [node for node in graph.fx.nodes if node.op == "call_function" and inside(node.meta["module"])]


def check_values(graph: Graph) -> None:
    """Refuse weights that no score and no proof can be computed from.

    Raises:
        InputError: a parameter holds NaN or inf, or another tensor NaN (masks may well hold inf).
    """
    for name, tensor in graph.tensors.items():
        if name not in graph.owned or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if bool(torch.isfinite(tensor.detach().sum())):  # one pass; a sum that overflows is looked at again
            continue
        given = isinstance(tensor, nn.Parameter)
        bad = ~torch.isfinite(tensor.detach()) if given else torch.isnan(tensor.detach())
        if bool(bad.any()) and not name.startswith("_"):
            raise InputError(
                "the model's weights hold NaN or inf",
                where=name,
                why="no score and no proof can be computed from them",
                fix="load sound weights, or repair them (see torch.nan_to_num)",
            )


def is_read(node: fx.Node, output: int) -> bool:
    """Whether anything reads one of the outputs of an op that has several."""
    return any(
        user.target is operator.getitem and user.args[1] == output and user.users for user in node.users
    )
