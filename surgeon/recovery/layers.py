"""find_sites(recording, kept): the layers whose weights can be solved for, and what each should give.

A site is a convolution or matrix product of data with one parameter that is used once. What it should give is
what the original gives at the same op; or, where its result is added to a value that is known by then (the
residual stream), the original's sum less the small model's other summand: so each block makes up for the
errors of those before it. Between product and sum may lie affine steps (batch norm, layer scale) and moves,
which are undone on the way back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.aliasing import getitem
from surgeon.criteria.data.consumers import NORMS, moving, only_reader
from surgeon.graph.graph import Graph, spec
from surgeon.ops.table import op_name
from surgeon.recovery.paired_run import PairedRun, twin

_CONVOLUTIONS = frozenset(("convolution", "_convolution"))
_MATRICES = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "linear": (0, 1),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
}  # places of data and weight
_TURNS = frozenset(("t", "transpose", "permute"))
_MOVES = frozenset(
    ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "alias")
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter as an op reads it: turned by these ops on the way."""

    name: str
    turns: tuple[fx.Node, ...] = ()

    def read(self, tensor: Tensor) -> Tensor:
        """The parameter as the op reads it."""
        for node in self.turns:
            tensor = node.target(tensor, *node.args[1:])  # type: ignore[operator]  # an op
        return tensor

    def write(self, tensor: Tensor) -> Tensor:
        """The parameter as it is stored, from what the op is to read."""
        for node in reversed(self.turns):
            tensor = _back(node, tensor, [])
        return tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weight can be solved for.

    Attributes:
        node: the product in the small model's first run; twin: the same in the original's.
        data: place of its data operand. weight: what it multiplies.
        bias: name of the tensor that takes a constant per output; "" if there is none.
        norm: whether that tensor is the running mean of the batch norm behind, which a constant is subtracted
            from.
        path: the steps from the product (exclusive) to the sum (exclusive), in the small and the original
            run; rest: place of the other summand; sum, twin_sum: the sums. None if the target is the
            product's own result.
    """

    node: fx.Node
    twin: fx.Node
    data: int
    weight: Weight
    bias: str = ""
    norm: bool = False
    path: tuple[fx.Node, ...] = ()
    rest: int = -1
    sum: fx.Node | None = None
    twin_sum: fx.Node | None = None

    @property
    def name(self) -> str:
        """The layer by the name of its weight."""
        return self.weight.name.removesuffix(".weight")

    @property
    def target(self) -> fx.Node:
        """The original's node that says what the site should give."""
        return self.twin if self.twin_sum is None else self.twin_sum

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution."""
        return op_name(self.node) in _CONVOLUTIONS

    @property
    def ungrouped(self) -> bool:
        """Whether all inputs meet all outputs: no grouped convolution, no batch of products."""
        return op_name(self.node) not in ("bmm", "baddbmm") and not (
            self.convolution and self.node.args[8] != 1
        )


def find_layers(small: Graph, big: Graph) -> tuple[list[Layer], dict[str, str]]:
    """The sites in the order of the run, and the parameters of products that are none, each with the
    reason.
    """
    theirs: dict[str, list[fx.Node]] = {}
    for node in big.fx.nodes:
        for weight, _ in _products(node, big):
            theirs.setdefault(weight.name, []).append(node)
    finder = _Finder(small, big)
    sites, left = [], {}
    for node in small.fx.nodes:
        for weight, data in _products(node, small):
            twins = theirs.get(weight.name, [])
            reason = finder.reason(weight, twins)
            if reason:
                left[weight.name] = reason
            else:
                sites.append(finder.site(node, twins[0], data, weight))
    return sites, left


def _products(node: fx.Node, graph: Graph) -> Iterator[tuple[Weight, int]]:
    """The parameter that a product of data multiplies, and the place of the data."""
    name = op_name(node) if node.op == "call_function" else ""
    if name not in _CONVOLUTIONS and name not in _MATRICES:
        return
    data, place = (0, 1) if name in _CONVOLUTIONS else _MATRICES[name]
    if name == "linear":
        place = 1
    weight = _weight(node.args[place], graph)
    if weight is not None and isinstance(node.args[data], fx.Node):
        yield weight, data


def _weight(node: Any, graph: Graph) -> Weight | None:
    turns: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in _TURNS:
        turns.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    name = str(node.target)
    known = name in graph.owned and isinstance(graph.tensors[name], nn.Parameter)
    return Weight(name, tuple(reversed(turns))) if known else None


class _Finder:
    def __init__(self, small: Graph, big: Graph) -> None:
        self.small, self.big = small, big
        self.place = {node: i for i, node in enumerate(small.fx.nodes)}
        self.moving = moving(small)
        self.readers: dict[str, list[fx.Node]] = {}
        for node in small.fx.nodes:
            if node.op == "get_attr":
                self.readers.setdefault(str(node.target), []).extend(node.users)

    def reason(self, weight: Weight, twins: list[fx.Node]) -> str:
        """Why a weight cannot be solved for; "" if it can."""
        if len(self.readers[weight.name]) != 1 or any(len(node.users) != 1 for node in weight.turns):
            return "it is used more than once"
        if len(twins) != 1:
            return "the original does not use it once"
        if not self.small.tensors[weight.name].is_floating_point():
            return "it is not a floating-point tensor"
        return ""

    def site(self, node: fx.Node, other: fx.Node, data: int, weight: Weight) -> Layer:
        bias, norm = self._bias(node)
        plain = Layer(node, other, data, weight, bias, norm)
        path: list[fx.Node] = []
        here, there = node, other
        while True:
            ours, theirs = only_reader(here), only_reader(there)
            if ours is None or theirs is None or op_name(ours) != op_name(theirs):
                return plain
            rest = self._rest(ours, here)
            if rest is None:
                if not self._passes(ours, here):
                    return plain
                path.append(ours)
                here, there = ours, theirs
                continue
            known: Any = ours.args[rest]
            source = (
                known.args[0] if known.target is getitem else known
            )  # to read one of several results takes no time
            added = op_name(ours) == "add" and not ours.kwargs and theirs.args[1 - rest] is there
            if not added or self.place[source] > self.place[node]:
                return plain
            return dataclasses.replace(plain, path=tuple(path), rest=rest, sum=ours, twin_sum=theirs)

    def _rest(self, node: fx.Node, given: fx.Node) -> int | None:
        """The place of another operand that the inputs move; None if there is none."""
        for place, item in enumerate(node.args):
            if isinstance(item, fx.Node) and item is not given and item in self.moving:
                return place
        return None

    def _passes(self, node: fx.Node, given: fx.Node) -> bool:
        """Whether a step can be undone."""
        name = op_name(node)
        if name in NORMS:
            return node.args[0] is given and not _trains(node)
        if node.target is getitem:
            return bool(node.args[1] == 0)
        if name in ("add", "sub", "mul", "div"):
            return (
                not node.kwargs
                and node.args[0] is not node.args[1]
                and (node.args[0] is given or name in ("add", "mul"))
            )
        return name in _MOVES and node.args[0] is given

    def _bias(self, node: fx.Node) -> tuple[str, bool]:
        name = op_name(node)
        place = (
            2 if name in _CONVOLUTIONS or name == "linear" else 0 if name in ("addmm", "baddbmm") else None
        )
        given = node.args[place] if place is not None and len(node.args) > place else None
        if isinstance(given, fx.Node):
            whole = name in _CONVOLUTIONS or spec(given).shape == spec(node).shape[-1:]
            return (
                (str(given.target), False)
                if given.op == "get_attr" and whole and self._alone(str(given.target))
                else ("", False)
            )
        reader = only_reader(node)
        if reader is not None and op_name(reader) in NORMS and not _trains(reader) and reader.args[0] is node:
            mean = reader.args[3]
            if isinstance(mean, fx.Node) and mean.op == "get_attr" and self._alone(str(mean.target)):
                return str(mean.target), True
        return "", False

    def _alone(self, name: str) -> bool:
        return name in self.small.owned and len(self.readers.get(name, ())) == 1


def norm_behind(node: fx.Node, graph: Graph) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of the batch norm in eval mode that alone reads a product, in float64; None if there is
    none.
    """
    reader = only_reader(node)
    if reader is None or op_name(reader) not in NORMS or _trains(reader) or reader.args[0] is not node:
        return None
    held: list[Any] = [
        graph.tensors[str(a.target)].double() if isinstance(a, fx.Node) and a is not node else a
        for a in reader.args
    ]
    return norm_affine(held)


def _trains(node: fx.Node) -> bool:
    """Whether a batch norm uses the statistics of its batch."""
    return op_name(node) != "_native_batch_norm_legit_no_training" and bool(node.args[5])


# -- from the sum back to the product ------------------------------------------------------------------------


def pulled(site: Layer, first: PairedRun, run: PairedRun, wanted: Tensor) -> Tensor:
    """What the product should give so that the sum is `wanted`; entries that nothing brings about are NaN or
    infinite.

    Args:
        first: the run in whose nodes the site is said. run: the batch's.
        wanted: the original's sum, narrowed to the entries that stay.
    """
    if site.sum is None:
        return wanted
    rest = twin(site.sum, first, run).args[site.rest]
    assert isinstance(rest, fx.Node)
    wanted = wanted - run.evaluate(rest)
    steps = [twin(node, first, run) for node in (site.node, *site.path)]
    for given, node in reversed(list(itertools.pairwise(steps))):
        wanted = _back(node, wanted, [None if item is given else run.evaluate(item) for item in node.args])
    return wanted


def _back(node: fx.Node, value: Tensor, operands: Sequence[Any]) -> Tensor:
    """What a step was given, from its result and its other operands."""
    name = op_name(node)
    if name in NORMS:
        scale, shift = norm_affine(operands)
        shape = [-1 if d == 1 else 1 for d in range(value.dim())]
        return (value - shift.reshape(shape)) / scale.reshape(shape)
    if node.target is getitem or name in ("clone", "alias"):
        return value
    if name in ("add", "sub", "mul", "div"):
        other = next(item for item in operands if item is not None)
        undo: dict[str, Callable[[Any, Any], Any]] = {
            "add": torch.sub, "sub": torch.add, "mul": torch.div, "div": torch.mul,
        }  # fmt: skip
        found: Tensor = undo[name](value, other)
        return found
    if name == "permute":
        dims: Any = node.args[1]
        order = [d % value.dim() for d in dims]
        return value.permute([order.index(d) for d in range(value.dim())])
    if name == "transpose":
        return value.transpose(node.args[1], node.args[2])  # type: ignore[arg-type]  # two dims
    if name == "t":
        return value.t()
    source: Any = node.args[0]
    return value.reshape(spec(source).shape)


def norm_affine(operands: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, from its operands."""
    weight, bias, mean, var = operands[1:5]
    scale = (var + operands[-1]).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
