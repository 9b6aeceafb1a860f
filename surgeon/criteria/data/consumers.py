"""find_consumers(graph, propagation, atoms) -> the products that sum over channels, and which atoms each
entry leaves with.

A consumer is a convolution or matrix product of data with a weight, or of data with data (queries with keys).
Ids tell, not layer types: the summed dim of its data operand carries a track. Data is read as [samples,
positions, groups, width] and weights as [groups, width, fan], where [groups, width] are the *entries* that
are summed over (groups: of a convolution, or matrices of a batched product). Products that sum over one
entry, such as depthwise convolutions, mix nothing and are none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.coupling.propagate import Propagation
from surgeon.graph.graph import Graph, spec
from surgeon.ops.ids import DimIds, ValueIds
from surgeon.ops.table import FUSED_ATTENTION, op_name

NORMS = frozenset(
    (
        "native_batch_norm",
        "cudnn_batch_norm",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_impl_index",
    )
)
Reading = Callable[[Tensor], Tensor]
Atoms = Callable[[DimIds], list[DimIds]]  # ids -> arrays of the atoms that take them along

# op -> places and letters of its operands: k is summed over, b numbers matrices, * is any dims
_PRODUCTS = {
    "mm": (0, 1, "ik", "kj"),
    "addmm": (1, 2, "ik", "kj"),
    "bmm": (0, 1, "bik", "bkj"),
    "baddbmm": (1, 2, "bik", "bkj"),
    "addbmm": (1, 2, "bik", "bkj"),
    "mv": (0, 1, "ik", "k"),
    "addmv": (1, 2, "ik", "k"),
    "linear": (0, 1, "*k", "jk"),
    "_grouped_mm": (0, 1, "ik", "ekj"),
}


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Where channels are read.

    Attributes:
        node: the op. data, weight: places of its operands; -1 for both if the op's own result is meant.
        rows: data as [samples, positions, groups, width]. fan: weights as [groups, width, fan].
        atoms: arrays [groups * width] of atoms that each entry leaves with, -1 where there are fewer.
        channels: dims of the data whose sizes no batch may change.
        moving: whether the weight is computed from the model's inputs.
        planes: whether the data is [samples, channels, height, width].
    """

    node: fx.Node
    data: int
    weight: int
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
        name, dims = op_name(self.node), len(spec(self.node).shape)
        if name in ("convolution", "_convolution"):
            return (1,)
        return (0, dims - 1) if name in ("bmm", "baddbmm") else (dims - 1,)

    @property
    def constant(self) -> bool:
        """Whether its results can be moved by a constant each: they have a bias, or a batch norm alone reads
        them.
        """
        place = {"addmm": 0, "baddbmm": 0, "addmv": 0, "linear": 2, "convolution": 2, "_convolution": 2}.get(
            op_name(self.node)
        )
        if place is not None and len(self.node.args) > place and isinstance(self.node.args[place], fx.Node):
            return True
        reader = only_reader(self.node)
        return reader is not None and op_name(reader) in NORMS and reader.args[0] is self.node


def find_consumers(graph: Graph, propagation: Propagation, atoms: Atoms) -> list[Consumer]:
    """All consumers of entries that some atom takes along, in order; `atoms` is `Solution.atoms`."""
    moves = moving(graph)
    found = []
    for node in graph.fx.nodes:
        if node.op == "call_function":
            found += [c for c in _at(node, propagation, atoms, moves) if any((a >= 0).any() for a in c.atoms)]
    return found


def find_planes(graph: Graph, propagation: Propagation, atoms: Atoms, lanes: DimIds) -> Consumer | None:
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
            if axes[1].size == held.shape[1] and np.isin(lanes, np.concatenate(found)).all():
                shape = (1, held.shape[1])
                return Consumer(call.node, -1, -1, _pixels(1), _nothing, shape, found, (1,), planes=True)
    return None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The only op that reads a node; of a norm, that reads its first result."""
    readers = [u for u in node.users if not (u.target is getitem and u.args[1] != 0 and not u.users)]
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def moving(graph: Graph) -> set[fx.Node]:
    """The nodes whose values hang on the model's inputs."""
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


@dataclasses.dataclass(frozen=True)
class _Side:
    """One operand: its place, a letter for each dim (b and h number matrices, k is summed over), and how to
    read it.
    """

    place: int
    letters: str
    rows: Reading
    fan: Reading

    def dims(self, letters: str) -> tuple[int, ...]:
        return tuple(i for i, letter in enumerate(self.letters) if letter in letters)


def _sides(node: fx.Node, period: int) -> list[_Side]:
    """The operands of a contraction, those that data may be first; none for other ops."""
    name = op_name(node)
    if name in ("convolution", "_convolution"):
        pixels, fan = _convolution(node)
        return [_Side(0, "nk" + "p" * 3, pixels, _nothing), _Side(1, "", _nothing, fan)]
    if name in FUSED_ATTENTION:
        rows = _heads(_shape(node.args[0])[1])
        return [_Side(place, "nhpk", rows, _as_fan(rows)) for place in (0, 1)]
    if name not in _PRODUCTS:
        return []
    *places, left, right = _PRODUCTS[name]
    found = []
    for place, letters in zip(places, (left, right), strict=True):
        rows = _matrix(letters, period)
        full = letters.replace("*", "i" * (len(_shape(node.args[place])) - 1))
        found.append(_Side(place, full, rows, _as_fan(rows)))
    return found


def _at(node: fx.Node, propagation: Propagation, atoms: Atoms, moving: set[fx.Node]) -> Iterator[Consumer]:
    sides = _sides(node, 1)
    if not sides:
        return
    both = all(node.args[side.place] in moving for side in sides)
    for number in (0, 1):
        operand, other = (node.args[sides[i].place] for i in (number, 1 - number))
        axes = propagation.axes.get(operand, {}) if isinstance(operand, fx.Node) else {}
        if operand not in moving or not axes or not sides[number].letters or (both and number == 1):
            continue
        if "b" in sides[number].letters:
            sides = _sides(node, _period(operand, other, axes, atoms, both))
        data, weight = sides[number], sides[1 - number]
        shape, found = _entries(operand, axes, data, atoms)
        if found and shape[1] > 1:
            planes = len(_shape(operand)) == 4 and weight.letters == "" and max(_shape(operand)[2:]) > 1
            yield Consumer(
                node,
                data.place,
                weight.place,
                data.rows,
                weight.fan,
                shape,
                found,
                data.dims("hk"),
                both,
                planes,
            )


def _entries(
    node: Any, axes: ValueIds, side: _Side, atoms: Atoms
) -> tuple[tuple[int, int], tuple[DimIds, ...]]:
    """(groups, width) of an operand and the atoms of these entries, read like its values."""
    dims = side.dims("bhk")
    sizes = [n if d in dims else 1 for d, n in enumerate(_shape(node))]
    read = side.rows(torch.zeros(sizes))
    found: list[DimIds] = []
    for dim in dims:
        if dim in axes:
            track = axes[dim]
            for d in set(range(track.ndim)) - set(dims):  # all entries along it leave together
                track = np.take(track, [0], axis=d)
            ids = torch.from_numpy(np.broadcast_to(track, sizes).copy())
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
        if op_name(node) == "expand":
            return True
        node = node.all_input_nodes[0]
    return False


def _nothing(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(0)


def _pixels(groups: int) -> Reading:
    """[N, C, places] as [N, places, groups, C / groups]."""
    return lambda x: x.flatten(2).transpose(1, 2).reshape(len(x), -1, groups, x.shape[1] // groups)


def _convolution(node: fx.Node) -> list[Reading]:
    transposed, groups = bool(node.args[6]), int(node.args[8])  # type: ignore[arg-type]  # a number in the schema

    def fan(weight: Tensor) -> Tensor:
        if transposed:  # [C, O/g, taps]
            return weight.flatten(1).reshape(groups, weight.shape[0] // groups, -1)
        split = weight.flatten(2).reshape(
            groups, weight.shape[0] // groups, weight.shape[1], -1
        )  # [O, C/g, taps]
        return split.permute(0, 2, 1, 3).flatten(2)

    return [_pixels(groups), fan]


def _matrix(letters: str, period: int) -> Reading:
    """An operand of a product as [samples, positions, groups, width]."""

    def rows(x: Tensor) -> Tensor:
        if letters == "*k":
            x = x[None] if x.dim() == 1 else x
            return x.flatten(1, -2).unsqueeze(2) if x.dim() > 2 else x[:, None, None]
        x = x.movedim(letters.index("k"), -1)
        if "b" in letters:
            return x.reshape(x.shape[0] // period, period, *x.shape[1:]).transpose(1, 2)
        return x[:, :, None] if x.dim() == 3 else x.reshape(-1, 1, 1, x.shape[-1])

    return rows


def _heads(count: int) -> Reading:
    """[N, heads, positions, dim] as [N, positions, heads, dim]; heads of keys that serve several of queries
    are repeated.
    """
    return lambda x: x.repeat_interleave(count // x.shape[1], 1).transpose(1, 2)


def _as_fan(rows: Reading) -> Reading:
    return lambda x: rows(x).permute(2, 3, 0, 1).flatten(2)
