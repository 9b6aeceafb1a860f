"""find_consumers(graph, propagation, atoms) -> the products that sum over channels, and which atoms each
entry leaves with.

A consumer is a convolution or matrix product of data with a weight, or of data with data (queries with keys).
Ids say so, not layer types: the summed dim of its data operand has ids. Data is read as [samples,
positions, groups, width] and weights as [groups, width, fan], where [groups, width] are the *entries* that
are summed over (groups: of a convolution, or matrices of a batched product). Products that sum over one
entry, such as depthwise convolutions, mix nothing and are none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.coupling.propagate import Propagation
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.letters import Operand, Step
from surgeon.ops.product import Product
from surgeon.ops.table import Trait, has, op_name, product

_SAMPLES = "n"  # the letter that numbers them
Reading = Callable[[Tensor], Tensor]
Atoms = Callable[[DimIds], list[DimIds]]  # ids -> arrays of the atoms that take them along


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Where channels are read.

    Attributes:
        node: the op. data, weight: names of its operands; "" for both if the op's own result is meant.
        rows: data as [samples, positions, groups, width]. fan: weights as [groups, width, fan].
        atoms: arrays [groups * width] of atoms that each entry leaves with, -1 where there are fewer.
        channels: dims of the data whose sizes no batch may change.
        moving: whether the weight is computed from the model's inputs.
        planes: whether the data is [samples, channels, height, width].
    """

    node: fx.Node
    data: str
    weight: str
    rows: Reading
    fan: Reading
    shape: tuple[int, int]
    atoms: tuple[DimIds, ...]
    channels: tuple[int, ...]
    moving: bool = False
    planes: bool = False

    @property
    def outputs(self) -> tuple[int, ...]:
        """Dims of the result along which it has other weights."""
        products = product(self.node)
        if products is None:
            return (1,)
        weights = frozenset(
            letter for o in products.operands if o.name == self.weight for letter in o.letters
        )
        return tuple(products.out.with_any(weights))

    @property
    def constant(self) -> bool:
        """Whether its results can be moved by a constant each: they have a bias, or a batch norm alone reads
        them.
        """
        products = product(self.node)
        if products is not None and products.added:
            return True
        reader = only_reader(self.node)
        return reader is not None and normalises(reader, self.node)


def find_consumers(graph: Graph, propagation: Propagation, atoms: Atoms) -> list[Consumer]:
    """All consumers of entries that some atom takes along, in order; `atoms` is `Solution.atoms`."""
    moves = moving(graph)
    found = []
    for node in graph.fx.nodes:
        if node.op == "call_function":
            found += [c for c in _at(node, propagation, atoms, moves) if any((a >= 0).any() for a in c.atoms)]
    return found


def find_planes(graph: Graph, propagation: Propagation, atoms: Atoms, sets: DimIds) -> Consumer | None:
    """The last value [samples, channels, height, width] whose channels leave with these atoms; None if there
    is none.
    """
    for call in reversed(graph.calls):
        several = isinstance(call.node.meta["spec"], tuple)
        axes = propagation.axes.get(call.node, {})
        axes = axes[0] if isinstance(axes, tuple) and axes else axes
        if not isinstance(axes, dict) or set(axes) != {1} or (several and call.node.meta["spec"][0] is None):
            continue
        held = spec(call.node)
        if len(held.shape) == 4 and held.dtype.is_floating_point and max(held.shape[2:]) > 1:
            found = tuple(a.ravel() for a in atoms(axes[1]))
            if axes[1].size == held.shape[1] and np.isin(sets, np.concatenate(found)).all():
                shape = (1, held.shape[1])
                return Consumer(call.node, "", "", _pixels, _nothing, shape, found, (1,), planes=True)
    return None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The only op that reads a node; of a norm, that reads its first result."""
    readers = [u for u in node.users if not (u.target is getitem and u.args[1] != 0 and not u.users)]
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def normalises(reader: fx.Node, node: fx.Node) -> bool:
    """Whether an op is the batch norm of a value."""
    return has(op_name(reader), Trait.BATCH_NORM) and arguments(reader)["input"] is node


def moving(graph: Graph) -> set[fx.Node]:
    """The nodes whose values hang on the model's inputs."""
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


@dataclasses.dataclass(frozen=True)
class _Side:
    """One operand of a product: its dims by letters, and how to read it.

    `rows` reads values as [samples, positions, groups, width]: n numbers samples, other letters of its own positions, letters
    that number products groups, and those that are summed over the width.
    """

    operand: Operand
    step: Step
    sizes: Mapping[str, int]

    @property
    def summed(self) -> frozenset[str]:
        """Letters of the width: the places of a kernel share one."""
        return self.step.summed - self.step.kernel

    @property
    def mixed(self) -> tuple[int, ...]:
        """Dims whose entries are summed over or number products."""
        return tuple(self.operand.with_any(self.summed | self.step.batch - {_SAMPLES}))

    @property
    def channels(self) -> tuple[int, ...]:
        """Those of them that do not number samples."""
        return tuple(dim for dim in self.mixed if _SAMPLES not in self.operand.dims[dim].letters)

    @property
    def _numbered(self) -> list[str]:
        """Letters that number products: also those of heads that share a head of the other operand."""
        dims = (self.step.operands[0].dims[i] for i in self.step.operands[0].with_any(self.step.batch))
        return [letter for dim in dims for letter in dim.letters if letter not in self.summed | {_SAMPLES}]

    def rows(self, x: Tensor) -> Tensor:
        letters, sizes = list[str](), list[int]()
        for dim, size in zip(self.operand.dims, x.shape, strict=True):
            inner = [self.sizes[letter] if size > 1 else 1 for letter in dim.letters[1:] if not dim.window]
            letters += dim.letters[: len(inner) + 1]
            sizes += [size // math.prod(inner), *inner]
        x = x.reshape(sizes)
        for letter in self._numbered:
            if letter not in letters:
                letters.append(letter)
                x = x[..., None].expand(*x.shape, self.sizes[letter])
        own = [letter for letter in letters if letter not in self.summed and letter not in self._numbered]
        width = [letter for letter in letters if letter in self.summed]
        x = x.permute([letters.index(letter) for letter in (*own, *self._numbered, *width)])
        parts = (
            x.shape[: len(own)],
            x.shape[len(own) : len(own) + len(self._numbered)],
            x.shape[x.dim() - len(width) :],
        )
        first = parts[0][:1].numel()
        return x.reshape(first, parts[0].numel() // max(first, 1), parts[1].numel(), parts[2].numel())

    def fan(self, x: Tensor) -> Tensor:
        """Weights as [groups, width, fan]."""
        return self.rows(x).permute(2, 3, 0, 1).flatten(2)


def _sides(node: fx.Node, products: Product, period: int) -> list[_Side]:
    """The operands of a product, in which every sample has `period` matrices."""
    step = products.steps[0]
    given = arguments(node)
    shapes = {operand.name: _shape(given[operand.name]) for operand in products.operands}
    sizes = products.resized(
        shapes, spec(node).shape, {"h": period} if _batched(step.operands[0]) else {}
    ).sizes
    return [_Side(operand, step, sizes) for operand in step.operands]


def _batched(operand: Operand) -> bool:
    """Whether a dim numbers the matrices of all samples."""
    return any(_SAMPLES in dim.letters and len(dim.letters) > 1 for dim in operand.dims)


def _at(node: fx.Node, propagation: Propagation, atoms: Atoms, moving: set[fx.Node]) -> Iterator[Consumer]:
    products = product(node)
    if products is None or not products.steps[0].summed or len(products.steps[0].operands) != 2:
        return
    sides = _sides(node, products, 1)
    operands = [arguments(node)[side.operand.name] for side in sides]
    both = all(operand in moving for operand in operands)
    for number in (0, 1):
        operand, other = operands[number], operands[1 - number]
        axes = propagation.axes.get(operand, {})
        if operand not in moving or not axes or (number == 1 and (both or products.windows)):
            continue
        if _batched(sides[number].operand):
            sides = _sides(node, products, _period(operand, other, axes, atoms, both))
        data, weight = sides[number], sides[1 - number]
        shape, found = _entries(operand, axes, data, atoms)
        if found and shape[1] > 1:
            planes = len(_shape(operand)) == 4 and products.windows and max(_shape(operand)[2:]) > 1
            names = data.operand.name, weight.operand.name
            yield Consumer(node, *names, data.rows, weight.fan, shape, found, data.channels, both, planes)


def _entries(
    node: Any, axes: ValueIds, side: _Side, atoms: Atoms
) -> tuple[tuple[int, int], tuple[DimIds, ...]]:
    """(groups, width) of an operand and the atoms of these entries, read like its values."""
    dims = side.mixed
    sizes = [n if d in dims else 1 for d, n in enumerate(_shape(node))]
    read = side.rows(torch.zeros(sizes))
    found: list[DimIds] = []
    for dim in dims:
        if dim in axes:
            dim_ids = axes[dim]
            for d in set(range(dim_ids.ndim)) - set(dims):  # all entries along it leave together
                dim_ids = np.take(dim_ids, [0], axis=d)
            ids = torch.from_numpy(np.broadcast_to(dim_ids, sizes).copy())
            found += [part for part in atoms(side.rows(ids)[0, 0].numpy().ravel()) if (part >= 0).any()]
    return (read.shape[2], read.shape[3]), tuple(found)


def _shape(node: Any) -> tuple[int, ...]:
    return spec(node).shape


def _period(operand: Any, weight: Any, axes: ValueIds, atoms: Atoms, both: bool) -> int:
    """After how many matrices of a batched product the entries repeat: samples are the outer part of their
    number.

    Weights that differ from matrix to matrix do not repeat.
    """
    size = _shape(operand)[0]
    if not both and not _repeats(weight):
        return size
    ids = [
        a for t in axes.values() for a in atoms(np.broadcast_to(t, (size, *t.shape[1:])).reshape(size, -1))
    ]
    for period in range(1, size):
        if size % period == 0 and all((a == np.tile(a[:period], (size // period, 1))).all() for a in ids):
            return period
    return size


def _repeats(node: Any) -> bool:
    """Whether a weight was expanded to one copy for each sample."""
    while node.op == "call_function" and node.all_input_nodes:
        if has(op_name(node), Trait.REPEATS):
            return True
        node = node.all_input_nodes[0]
    return False


def _nothing(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(0)


def _pixels(x: Tensor) -> Tensor:
    """[N, C, places] as [N, places, 1, C]."""
    return x.flatten(2).transpose(1, 2)[:, :, None]
