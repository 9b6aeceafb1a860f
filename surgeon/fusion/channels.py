"""Where a layer's channels lie in later values: labels are carried through views by running the same views on
them.

Labels are an integer tensor of a value's shape that says of each entry which channel it belongs to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.graph import Graph, spec

_aten = torch.ops.aten
RESHAPES = {_aten.view.default, _aten._unsafe_view.default}
_MOVES = RESHAPES | {
    _aten.permute.default, _aten.transpose.int, _aten.t.default,
    _aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.alias.default,
    _aten.detach.default, _aten.clone.default,
}  # fmt: skip


def labels_of(node: fx.Node, dim: int) -> Tensor:
    """Labels of the value of `node` whose channels lie along `dim`."""
    shape = spec(node).shape
    dim %= len(shape)
    return torch.arange(shape[dim]).reshape(-1, *[1] * (len(shape) - 1 - dim)).expand(shape)


def follow(node: fx.Node, labels: Tensor) -> tuple[fx.Node, Tensor]:
    """The last value to which nothing but views and copies lead, each the only reader of the one before; and
    its labels.
    """
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in _MOVES or user.args[0] is not node:
            break
        if user.target in RESHAPES:  # labels are expanded, so that a view may have to copy them
            node, labels = user, labels.reshape(user.args[1])  # type: ignore[arg-type]  # a shape
        else:
            node, labels = user, user.target(labels, *user.args[1:])  # type: ignore[operator]  # an op of _MOVES
    return node, labels


class Constants:
    """The ops of a graph that read nothing but the model's tensors and numbers, and their values, computed
    when asked for.
    """

    def __init__(self, graph: Graph) -> None:
        self._tensors = graph.tensors
        self._values: dict[fx.Node, Any] = {}
        self._nodes: set[fx.Node] = set()
        for node in graph.fx.nodes:
            computed = (
                node.op == "call_function"
                and node.all_input_nodes
                and self._nodes.issuperset(node.all_input_nodes)
            )
            if node.op == "get_attr" or (
                computed and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
            ):
                self._nodes.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def value(self, node: fx.Node) -> Tensor:
        """What a node of them gives."""
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = self._tensors[str(node.target)].detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target
        found: Tensor = self._values[node]
        return found


def per_channel(values: Tensor, labels: Tensor) -> Tensor | None:
    """The one number that `values` (broadcast to the labels' shape) has for each label; None if they vary
    within a channel.
    """
    count = int(labels.max()) + 1
    if values.numel() > count or values.dim() > labels.dim():  # it is not constant along the other dims
        return None
    try:
        spread = values.detach().to("cpu").expand(labels.shape)
    except RuntimeError:  # the op's result is larger than the layer's
        return None
    for dim in range(labels.dim()):  # of repeated entries, one is enough
        if labels.stride(dim) == 0 and spread.stride(dim) == 0:
            labels, spread = labels.narrow(dim, 0, 1), spread.narrow(dim, 0, 1)
    found = torch.zeros(count, dtype=spread.dtype)
    found[labels.reshape(-1)] = spread.reshape(-1)
    return found if torch.equal(found[labels], spread) else None


def features(labels: Tensor) -> Tensor | None:
    """The labels along dim 1 if they are the same everywhere along all other dims, else None."""
    if labels.dim() < 2:
        return None
    first = labels.select(0, 0)
    while first.dim() > 1:
        first = first.select(-1, 0)
    for dim in (d for d in range(labels.dim()) if d != 1 and labels.stride(d) == 0):
        labels = labels.narrow(dim, 0, 1)
    shape = (1, -1, *[1] * (labels.dim() - 2))
    return first if torch.equal(first.reshape(shape).expand(labels.shape), labels) else None
