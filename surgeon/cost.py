"""Predict, exactly and before anything is changed, the shapes, MACs and params of the model that a choice leaves.

A *choice* is a mask over ids: which classes leave (see `solve`). One MAC is one multiply-accumulate of a convolution, matrix
product or attention product, for the example inputs as given, batch included; `torch.utils.flop_counter` counts two per MAC.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx
from torch.nn import Parameter

from surgeon._views import is_view, writes
from surgeon.graph import Graph, spec
from surgeon.labels import Axes, Track
from surgeon.propagate import Propagation
from surgeon.rules.registry import op_name
from surgeon.solve import Solution

Choice = Track


class Shapes:
    """Shapes of values and slots under a choice; evaluating one is cheap, so that budgets can be searched."""

    def __init__(self, graph: Graph, propagation: Propagation, solution: Solution) -> None:
        self.graph, self.propagation, self.solution = graph, propagation, solution
        self._atoms: dict[int, list[Track]] = {}
        self._widths: dict[tuple[int, int], int] = {}
        self._numbers: dict[int, int] = {}  # of tracks, by what they hold: most tracks are copies of a few
        self._contents: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._choice: Choice | None = None
        self.products = [n for n in graph.fx.nodes if n.op == "call_function" and op_name(n) in MACS]

    def leaves(self, track: Track, choice: Choice) -> Track:
        """Which entries of a track leave."""
        atoms = self._atoms.get(id(track))
        if atoms is None:
            atoms = self._atoms[id(track)] = self.solution.atoms(track)
        gone = np.zeros(track.shape, dtype=bool)
        for part in atoms:
            gone |= choice[part] & (part >= 0)
        return gone

    def width(self, track: Track, dim: int, choice: Choice) -> int:
        """How many entries stay along `dim` (in the rows that stay)."""
        if choice is not self._choice:
            self._choice = choice
            self._widths.clear()
        key = (self._number(track), dim)
        if key not in self._widths:
            self._widths[key] = int((~self.leaves(track, choice)).sum(axis=dim).max())
        return self._widths[key]

    def _number(self, track: Track) -> int:
        number = self._numbers.get(id(track))
        if number is None:
            number = self._contents.setdefault((track.shape, track.tobytes()), len(self._contents))
            self._numbers[id(track)] = number
        return number

    def shape(self, node: fx.Node, choice: Choice, output: int = 0) -> tuple[int, ...]:
        """Shape of (one output of) a node in the small model."""
        spec, axes = node.meta["spec"], self.propagation.axes.get(node, {})
        if isinstance(spec, tuple):
            spec = spec[output]
            axes = axes[output] if isinstance(axes, tuple) else axes
        return self._small(spec.shape, axes, choice)

    def _small(self, shape: tuple[int, ...], axes: Axes, choice: Choice) -> tuple[int, ...]:
        return tuple(self.width(axes[d], d, choice) if d in axes else n for d, n in enumerate(shape))

    def kept(self, choice: Choice) -> dict[str, dict[int, list[int]]]:
        """Kept indices of every slot that loses some: {tensor name: {dim: indices}}."""
        found: dict[str, dict[int, list[int]]] = {}
        lists: dict[bytes, list[int]] = {}  # slots of one group share one list
        for (name, dim), ids in self.propagation.slots.items():
            gone = self.leaves(ids, choice)
            if gone.any():
                key = gone.tobytes()
                if key not in lists:
                    lists[key] = np.flatnonzero(~gone).tolist()
                found.setdefault(name, {})[dim] = lists[key]
        return found

    def params(self, choice: Choice) -> int:
        """Number of elements of all parameters (not buffers); tied weights count once."""
        return sum(self.params_by_tensor(choice).values())

    def params_by_tensor(self, choice: Choice) -> dict[str, int]:
        return {name: self._elements(name, choice) for name in self.parameters}

    def size(self, choice: Choice) -> int:
        """Bytes of all parameters and stored buffers, tied ones once; a file adds its header, some hundred bytes per tensor."""
        tensors = self.graph.tensors
        return sum(self._elements(name, choice) * tensors[name].element_size() for name in self.graph.stored)

    def _elements(self, name: str, choice: Choice) -> int:
        shape = list(self.graph.tensors[name].shape)
        for dim in range(len(shape)):
            ids = self.propagation.slots.get((name, dim))
            if ids is not None:
                shape[dim] = self.width(ids, 0, choice)
        return math.prod(shape)

    @cached_property
    def parameters(self) -> list[str]:
        return [name for name in self.graph.owned if isinstance(self.graph.tensors[name], Parameter)]

    def memory(self, choice: Choice) -> int:
        """Bytes of the activations that are alive at once, at most, in one run on the example inputs.

        The inputs live throughout, each other value from the op that makes it to the last one that reads it; views and in-place
        ops share the memory of what they are made of. An executor that keeps values longer (or fuses ops) needs more (or less).
        """
        alive = peak = 0
        for made, ended in self._lifetimes:
            alive += sum(self._bytes(node, choice) for node in made)
            peak = max(peak, alive)
            alive -= sum(self._bytes(node, choice) for node in ended)
        return peak

    def _bytes(self, node: fx.Node, choice: Choice) -> int:
        specs = node.meta["spec"]
        outputs = specs if isinstance(specs, tuple) else (specs,)
        sizes = (s.dtype.itemsize * math.prod(self.shape(node, choice, i)) for i, s in enumerate(outputs) if s is not None)
        return sum(sizes)

    @cached_property
    def _lifetimes(self) -> list[tuple[list[fx.Node], list[fx.Node]]]:
        """For each op: the values whose memory it takes, and those of which it is the last reader."""
        called = {call.node: call.op for call in self.graph.calls}
        owner: dict[fx.Node, fx.Node | None] = {}  # whose memory a value lies in; None for the weights'
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.fx.nodes:
            first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            op = called.get(node)  # nodes that no op made take no memory: they put a write through a view into its base
            shares = node.op == "call_function" and (op is None or is_view(op) or writes(op))
            owner[node] = owner[first] if first is not None and shares else node
            if node.op == "output" or (node.op == "get_attr" and node.target in self.graph.owned):
                owner[node] = None  # weights are no activations
            for used in (node, *node.all_input_nodes):
                whose = owner[used]
                if whose is not None:
                    last[whose] = node
        inputs = {node for _, node in self.graph.inputs}  # whoever calls the model holds them
        ends: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for value, node in last.items():
            if value not in inputs:
                ends[node].append(value)
        made = {value for value in owner.values() if value is not None}
        return [([node] if node in made else [], ends[node]) for node in self.graph.fx.nodes]

    def macs(self, choice: Choice) -> int:
        """MACs of one run on the example inputs."""
        return sum(MACS[op_name(n)](*self._operands(n, choice)) for n in self.products)

    def _operands(self, node: fx.Node, choice: Choice) -> tuple[Any, ...]:
        shapes = [self.shape(a, choice) if isinstance(a, fx.Node) else a for a in node.args]
        return (self.shape(node, choice), *shapes)


def macs_of(graph: Graph) -> int:
    """MACs of one run of the model as it was recorded."""
    total = 0
    for node in graph.fx.nodes:
        if node.op == "call_function" and op_name(node) in MACS:
            given = [spec(a).shape if isinstance(a, fx.Node) else a for a in node.args]
            total += MACS[op_name(node)](spec(node).shape, *given)
    return total


def nothing(solution: Solution) -> Choice:
    """The choice that keeps everything."""
    return np.zeros(len(solution.root), dtype=bool)


def _convolution(out: Any, x: Any, weight: Any, *rest: Any) -> int:
    transposed = rest[4]
    places: int = math.prod(x[2:]) * x[0] if transposed else math.prod(out[2:]) * out[0]
    return places * int(math.prod(weight))


def _attention(out: Any, q: Any, k: Any, v: Any, *rest: Any) -> int:
    batch, heads, queries, dim = q
    pairs: int = batch * heads * queries * k[2]
    return pairs * int(dim + v[3])


MACS: Mapping[str, Any] = {
    "convolution": _convolution,
    "_convolution": _convolution,
    "mm": lambda out, a, b, *_: math.prod(out) * a[1],
    "addmm": lambda out, bias, a, b, *_: math.prod(out) * a[1],
    "bmm": lambda out, a, b, *_: math.prod(out) * a[2],
    "baddbmm": lambda out, bias, a, b, *_: math.prod(out) * a[2],
    "addbmm": lambda out, bias, a, b, *_: math.prod(a) * b[2],
    "mv": lambda out, a, b, *_: math.prod(a),
    "addmv": lambda out, bias, a, b, *_: math.prod(a),
    "dot": lambda out, a, b, *_: math.prod(a),
    "linear": lambda out, x, weight, *_: math.prod(out) * weight[1],
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}
