"""Predict, exactly and before anything is changed, the shapes, MACs and params of the model that a choice
leaves.

A *choice* is a mask over ids: which classes leave (see `solve`). One MAC is one multiply-accumulate of a
convolution, matrix product or attention product, for the example inputs as given, batch included;
`torch.utils.flop_counter` counts two per MAC.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import fx
from torch.nn import Parameter

from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.macs import products_of
from surgeon.ops.product import Product
from surgeon.ops.table import info
from surgeon.selection.memory import Lifetimes, bytes_of, lifetimes, outputs_of, peak

Choice = DimIds
_Part = tuple[str, Hashable]  # its kind, and what it is of


class ShapeModel:
    """Shapes of values and slots under a choice; evaluating one is cheap, so that budgets can be searched.

    What was computed for the last choice holds for the next one where no atom of what it read has changed. A
    choice that was evaluated must not be written to.
    """

    def __init__(self, graph: Graph, propagation: Propagation, solution: Solution) -> None:
        self.graph, self.propagation, self.solution = graph, propagation, solution
        self._widths: dict[int, dict[int, int]] = defaultdict(dict)  # of ids, by dim
        self._shapes: dict[tuple[fx.Node, int], tuple[int, ...]] = {}  # for the last choice
        self._parts: dict[_Part, int] = {}  # of sums over nodes or tensors
        self._sums: dict[str, int] = {}  # of the parts of a kind that are known
        self._missing: dict[str, dict[Hashable, None]] = {}  # the others
        self._readers: dict[int, set[_Part]] = defaultdict(set)  # the parts that hang on an array of ids
        self._asking: _Part | None = None  # the part that is being computed
        self._index: tuple[DimIds, DimIds] | None = None  # atoms, ascending, and the ids that hold each
        self._numbers: dict[int, int] = {}  # of arrays of ids, by what they hold: most are copies of a few
        self._contents: dict[tuple[tuple[int, ...], bytes], int] = {}
        self._atoms: dict[int, list[DimIds]] = {}  # of each number
        self._choice = self._former = nothing(solution)
        self.products = products_of(graph)

    def leaves(self, dim_ids: DimIds, choice: Choice) -> DimIds:
        """Which entries of an array of ids leave."""
        gone = np.zeros(dim_ids.shape, dtype=bool)
        for part in self._atoms[self._number(dim_ids)]:
            gone |= choice[part] & (part >= 0)
        return gone

    def width(self, dim_ids: DimIds, dim: int, choice: Choice) -> int:
        """How many entries stay along `dim` (in the rows that stay)."""
        if choice is not self._choice:
            self._follow(choice)
        number = self._numbers.get(id(dim_ids))
        if number is None:
            number = self._number(dim_ids)
        if self._asking is not None:
            self._readers[number].add(self._asking)
        widths = self._widths[number]
        if dim not in widths:
            widths[dim] = int((~self.leaves(dim_ids, choice)).sum(axis=dim).max(initial=0))
        return widths[dim]

    def _follow(self, choice: Choice) -> None:
        """Forget what hangs on atoms that differ from the last choice's."""
        if choice is self._choice:
            return
        self._shapes = {}
        changed = np.flatnonzero(choice != self._former)
        self._choice, self._former = choice, choice.copy()
        if not changed.size or not self._widths:
            return
        atoms, numbers = self._held()
        first, last = np.searchsorted(atoms, changed), np.searchsorted(atoms, changed, side="right")
        counts = last - first
        places = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        for number in np.unique(numbers[places]).tolist():
            self._widths.pop(number, None)
            for part in self._readers.pop(number, ()):
                value = self._parts.pop(part, None)
                kind, key = part
                if value is not None and kind in self._sums:
                    self._sums[kind] -= value
                    self._missing[kind][key] = None

    def _held(self) -> tuple[DimIds, DimIds]:
        """All atoms, ascending, and the numbers of the arrays of ids that hold them."""
        if self._index is None:
            found = [(np.unique(part[part >= 0]), n) for n, atoms in self._atoms.items() for part in atoms]
            atoms = np.concatenate([part for part, _ in found])
            order = np.argsort(atoms, kind="stable")
            self._index = (
                atoms[order],
                np.repeat([n for _, n in found], [len(part) for part, _ in found])[order],
            )
        return self._index

    def _part(self, key: _Part, choice: Choice, compute: Callable[[], int]) -> int:
        """A part of a sum, computed once for as long as nothing changes that it hangs on."""
        self._follow(choice)
        if key not in self._parts:
            self._asking = key
            try:
                self._parts[key] = compute()
            finally:
                self._asking = None
        return self._parts[key]

    def _sum(
        self, kind: str, keys: Iterable[Hashable], choice: Choice, compute: Callable[[Any, Choice], int]
    ) -> int:
        """The sum of parts, of which those alone are computed anew that hang on what has changed."""
        self._follow(choice)
        if kind not in self._sums:
            self._sums[kind], self._missing[kind] = 0, dict.fromkeys(keys)
        for key in self._missing[kind]:
            self._sums[kind] += self._part((kind, key), choice, partial(compute, key, choice))
        self._missing[kind] = {}
        return self._sums[kind]

    def _number(self, dim_ids: DimIds) -> int:
        number = self._numbers.get(id(dim_ids))
        if number is None:
            number = self._contents.setdefault((dim_ids.shape, dim_ids.tobytes()), len(self._contents))
            self._numbers[id(dim_ids)] = number
            if number not in self._atoms:
                self._atoms[number] = self.solution.atoms(dim_ids)
                self._index = None
        return number

    def shape(self, node: fx.Node, choice: Choice, output: int = 0) -> tuple[int, ...]:
        """Shape of (one output of) a node in the small model."""
        if choice is not self._choice:
            self._follow(choice)
        known = self._shapes.get((node, output)) if self._asking is None else None
        if known is not None:
            return known
        spec, axes = node.meta["spec"], self.propagation.axes.get(node, {})
        if isinstance(spec, tuple):
            spec = spec[output]
            axes = axes[output] if isinstance(axes, tuple) else axes
        found = self._shapes[node, output] = self._small(spec.shape, axes, choice)
        return found

    def _small(self, shape: tuple[int, ...], axes: ValueIds, choice: Choice) -> tuple[int, ...]:
        if not axes:
            return shape
        return tuple([self.width(axes[d], d, choice) if d in axes else n for d, n in enumerate(shape)])

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

    def chosen(self, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> Choice:
        """The choice that leaves these indices, as `kept` gives them: the atoms of removed ones, but those
        that a kept one has.

        Where no choice leaves just these, `kept` of what is returned differs from them.
        """
        gone, stays = nothing(self.solution), nothing(self.solution)
        for (name, dim), ids in self.propagation.slots.items():
            present = np.zeros(len(ids), dtype=bool)
            present[kept.get(name, {}).get(dim, slice(None))] = True
            for atoms in self.solution.atoms(ids):
                known = atoms >= 0
                gone[atoms[known & ~present]] = True
                stays[atoms[known & present]] = True
        gone &= ~stays
        return gone

    def before(self) -> tuple[int, int, int, int]:
        """MACs, params, size and memory of the original: of the choice that keeps everything, without evaluating one."""
        tensors = self.graph.tensors
        return (
            sum(product.macs for product in self.products.values()),
            sum(tensors[name].numel() for name in self.parameters),
            sum(tensors[name].numel() * tensors[name].element_size() for name in self.graph.stored),
            peak(self._lifetimes, lambda node: bytes_of(node, lambda output: outputs_of(node)[output].shape)),
        )

    def params(self, choice: Choice) -> int:
        """Number of elements of all parameters (not buffers); tied weights count once."""
        return self._sum("params", self.parameters, choice, self._count)

    def params_by_tensor(self, choice: Choice) -> dict[str, int]:
        return {name: self._count(name, choice) for name in self.parameters}

    def size(self, choice: Choice) -> int:
        """Bytes of all parameters and stored buffers, tied ones once; a file adds its header, some hundred
        bytes per tensor.
        """
        return self._sum("size", self.graph.stored, choice, self._stored)

    def _stored(self, name: str, choice: Choice) -> int:
        return self._count(name, choice) * self.graph.tensors[name].element_size()

    def _count(self, name: str, choice: Choice) -> int:
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

        The inputs live throughout, each other value from the op that makes it to the last one that reads it;
        views and in-place ops share the memory of what they are made of. An executor that keeps values longer
        (or fuses ops) needs more (or less).
        """
        return peak(self._lifetimes, lambda node: self._bytes(node, choice))

    @cached_property
    def _lifetimes(self) -> Lifetimes:
        return lifetimes(self.graph)

    def _bytes(self, node: fx.Node, choice: Choice) -> int:
        return self._part(("bytes", node), choice, partial(self._sized, node, choice))

    def _sized(self, node: fx.Node, choice: Choice) -> int:
        return bytes_of(node, lambda output: self.shape(node, choice, output))

    def macs(self, choice: Choice) -> int:
        """MACs of one run on the example inputs."""
        return self._sum("macs", self.products, choice, self._macs)

    def _macs(self, node: fx.Node, choice: Choice) -> int:
        return self.product(node, choice).macs

    def product(self, node: fx.Node, choice: Choice) -> Product:
        """A product of the graph as the small model computes it."""
        shapes = {name: self.shape(operand, choice) for name, operand in self._operands[node].items()}
        return self.products[node].resized(shapes, self.shape(node, choice))

    @cached_property
    def _operands(self) -> dict[fx.Node, dict[str, fx.Node]]:
        """The operands of each product, by name."""
        given = {node: arguments(node) for node in self.products}
        return {node: {o.name: given[node][o.name] for o in p.operands} for node, p in self.products.items()}


def needed_blocks(graph: Graph) -> dict[tuple[str, int], int]:
    """Slot -> what its width must be a multiple of, whatever is asked for: products by expert want rows of 16
    bytes.
    """
    found: dict[tuple[str, int], int] = {}
    for node, products in products_of(graph).items():
        if info(node).row_bytes == 1:
            continue
        weight = products.operands[-1]
        given = tensor = arguments(node)[weight.name]
        while isinstance(tensor, fx.Node) and tensor.op == "call_function":  # turned, or converted
            tensor = tensor.args[0]
        if isinstance(tensor, fx.Node):
            block = max(1, info(node).row_bytes // spec(given).dtype.itemsize)
            dims = weight.with_any(products.steps[-1].computed)
            found |= dict.fromkeys(((str(tensor.target), dim) for dim in dims), block)
    return found


def nothing(solution: Solution) -> Choice:
    """The choice that keeps everything."""
    return np.zeros(len(solution.root), dtype=bool)
