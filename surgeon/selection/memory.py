"""Memory of activations: which values an op adds to those that are alive, and which it is the last to read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from surgeon.capture.recording.aliasing import is_view, writes
from surgeon.graph.graph import Graph

Lifetimes = list[tuple[list[fx.Node], list[fx.Node]]]


def lifetimes(graph: Graph) -> Lifetimes:
    """For each op: the values whose memory it takes, and those of which it is the last reader."""
    called = {call.node: call.op for call in graph.calls}
    owner: dict[fx.Node, fx.Node | None] = {}  # whose memory a value lies in; None for the weights'
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        op = called.get(
            node
        )  # nodes that no op made take no memory: they put a write through a view into its base
        shares = node.op == "call_function" and (op is None or is_view(op) or writes(op))
        owner[node] = owner[first] if first is not None and shares else node
        if node.op == "output" or (node.op == "get_attr" and node.target in graph.owned):
            owner[node] = None  # weights are no activations
        for used in (node, *node.all_input_nodes):
            whose = owner[used]
            if whose is not None:
                last[whose] = node
    inputs = {node for _, node in graph.inputs}  # whoever calls the model holds them
    ends: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for value, node in last.items():
        if value not in inputs:
            ends[node].append(value)
    made = {value for value in owner.values() if value is not None}
    return [([node] if node in made else [], ends[node]) for node in graph.fx.nodes]


def peak(lifetimes: Lifetimes, size: Callable[[fx.Node], int]) -> int:
    """The most bytes that are alive at once; `size` gives those of a value."""
    alive = most = 0
    for made, ended in lifetimes:
        alive += sum(map(size, made))
        most = max(most, alive)
        alive -= sum(map(size, ended))
    return most


def outputs_of(node: fx.Node) -> tuple[Any, ...]:
    """The specs of an op's outputs, None where one is no tensor."""
    specs = node.meta["spec"]
    return specs if isinstance(specs, tuple) else (specs,)


def bytes_of(node: fx.Node, shape: Callable[[int], Sequence[int]]) -> int:
    """Bytes of a node's outputs, if they have these shapes."""
    every = enumerate(outputs_of(node))
    return sum(spec.dtype.itemsize * math.prod(shape(at)) for at, spec in every if spec is not None)
