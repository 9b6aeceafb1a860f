"""Questions about a recorded graph: what it reads, what ran where, whether its weights are sound."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.errors import InputError
from surgeon.graph.graph import Graph, Spec, spec

_SMALL = 1 << 12  # entries of a value that may go into a number


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


def made_of_numbers(graph: Graph, kernel: Callable[[Any], Any] = lambda op: op) -> dict[fx.Node, Tensor]:
    """The small values that hang on nothing but numbers in the model's code; `kernel` says what computes an op."""
    made: dict[fx.Node, Tensor] = {}
    for node in graph.fx.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" and node.target not in graph.owned:
            made[node] = graph.tensors[str(node.target)]
            continue
        known = all(n in made for n in inputs) if inputs else _counts_or_repeats(node)
        if (
            node.op == "call_function"
            and known
            and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())  # a draw
            and isinstance(node.meta["spec"], Spec)
            and math.prod(spec(node).shape) <= _SMALL
        ):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: made[n])
            made[node] = kernel(node.target)(*args, **kwargs)
    return made


def _counts_or_repeats(node: fx.Node) -> bool:
    """Whether an op that reads nothing gives the same in each run: it counts, or repeats one number. Memory that nobody wrote
    to is anything.
    """
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith("aten::") and "empty" not in schema.name


def number_in(item: Any, made: Mapping[fx.Node, Tensor]) -> float | None:
    """A number that the model's code passed, perhaps as a tensor without dims that it made on the way."""
    if isinstance(item, fx.Node):
        value = made.get(item)
        return None if value is None or value.dim() or value.is_complex() else float(value)
    return float(item) if isinstance(item, int | float) and not isinstance(item, bool) else None
