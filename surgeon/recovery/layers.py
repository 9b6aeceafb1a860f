"""find_layers(recording, kept): the layers whose weights can be solved for, and what each should give.

A layer is a convolution or matrix product of data with one parameter that is used once. What it should give is
what the original gives at the same op; or, where its result is added to a value that is known by then (the
residual stream), the original's sum less the small model's other summand: so each block makes up for the
errors of those before it. Between product and sum may lie affine steps (batch norm, layer scale) and moves,
which are undone on the way back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from surgeon.capture.recording.aliasing import getitem
from surgeon.criteria.data.consumers import moving, normalises, only_reader
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.families.elementwise import affine
from surgeon.ops.product import Product
from surgeon.ops.table import Trait, has, op_name, product
from surgeon.recovery.inverse_steps import back, trains
from surgeon.recovery.runs.paired_run import PairedRun, twin


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
            tensor = back(node, tensor, {})
        return tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weight can be solved for.

    Attributes:
        node: the product in the small model's first run; twin: the same in the original's.
        data: name of its data operand. weight: what it multiplies.
        bias: name of the tensor that takes a constant per output; "" if there is none.
        norm: whether that tensor is the running mean of the batch norm behind, which a constant is subtracted
            from.
        path: the steps from the product (exclusive) to the sum (exclusive), in the small and the original
            run; rest: place of the other summand; sum, twin_sum: the sums. None if the target is the
            product's own result.
    """

    node: fx.Node
    twin: fx.Node
    data: str
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
        """The original's node that says what the layer should give."""
        return self.twin if self.twin_sum is None else self.twin_sum

    @property
    def products(self) -> Product:
        """Its op by letters: one product of data with a weight."""
        found = product(self.node)
        assert found is not None
        return found

    @property
    def convolution(self) -> bool:
        return self.products.windows

    @property
    def batched(self) -> bool:
        """Whether it is a batch of products, each with a matrix of its own."""
        return not self.convolution and bool(self.products.steps[0].batch)

    @property
    def rows_first(self) -> bool:
        """Whether its matrix is read as [outputs, inputs], as that of a linear layer."""
        weight = self.products.operands[1]
        return weight.with_any(self.products.steps[0].summed)[0] > self.products.own(weight)[0]

    @property
    def ungrouped(self) -> bool:
        """Whether all inputs meet all outputs: no grouped convolution, no batch of products."""
        return not self.batched and self.products.count(self.products.steps[0].batch) == 1


def find_layers(small: Graph, big: Graph) -> tuple[list[Layer], dict[str, str]]:
    """The layers in the order of the run, and the parameters of products that are none, each with the
    reason.
    """
    theirs: dict[str, list[fx.Node]] = {}
    for node in big.fx.nodes:
        for weight, _ in _products(node, big):
            theirs.setdefault(weight.name, []).append(node)
    finder = _Finder(small, big)
    layers, left = [], {}
    for node in small.fx.nodes:
        for weight, data in _products(node, small):
            twins = theirs.get(weight.name, [])
            reason = finder.reason(weight, twins)
            if reason:
                left[weight.name] = reason
            else:
                layers.append(finder.layer(node, twins[0], data, weight))
    return layers, left


def _products(node: fx.Node, graph: Graph) -> Iterator[tuple[Weight, str]]:
    """The parameter that a product of data multiplies, and the name of the data's operand."""
    products = product(node)
    if products is None or len(products.steps) != 1 or len(products.operands) != 2:
        return
    (step,), (data, other) = products.steps, products.operands
    own = products.own(other)
    if not products.windows and (
        len(own) != 1 or len(step.summed) != 1 or not other.letters <= step.computed
    ):
        return  # what multiplies the data is no matrix of weights
    given = arguments(node)
    weight = _weight(given[other.name], graph)
    if weight is not None:
        yield weight, data.name


def _weight(node: Any, graph: Graph) -> Weight | None:
    turns: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and has(op_name(node), Trait.PERMUTES):
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

    def layer(self, node: fx.Node, other: fx.Node, data: str, weight: Weight) -> Layer:
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
        if has(name, Trait.BATCH_NORM):
            return normalises(node, given) and not trains(node)
        if node.target is getitem:
            return bool(node.args[1] == 0)
        if has(name, Trait.SCALES) or has(name, Trait.ADDS):
            operands, first = arguments(node), arguments(node)["self"] is given
            known = {**operands, "self": None if first else 1.0, "other": 1.0 if first else None}
            return operands["other" if first else "self"] is not given and affine(name, known) is not None
        moves = (Trait.RESHAPES, Trait.PERMUTES, Trait.COPIES)
        return any(has(name, trait) for trait in moves) and arguments(node)["self"] is given

    def _bias(self, node: fx.Node) -> tuple[str, bool]:
        products = product(node)
        for operand in products.added if products is not None else ():
            given = arguments(node)[operand.name]
            whole = bool(operand.dims) or spec(given).shape == spec(node).shape[-1:]
            named = given.op == "get_attr" and whole and self._alone(str(given.target))
            return (str(given.target) if named else ""), False
        reader = only_reader(node)
        if reader is not None and normalises(reader, node) and not trains(reader):
            mean = arguments(reader)["running_mean"]
            if isinstance(mean, fx.Node) and mean.op == "get_attr" and self._alone(str(mean.target)):
                return str(mean.target), True
        return "", False

    def _alone(self, name: str) -> bool:
        return name in self.small.owned and len(self.readers.get(name, ())) == 1


def pulled(layer: Layer, first: PairedRun, run: PairedRun, wanted: Tensor) -> Tensor:
    """What the product should give so that the sum is `wanted`; entries that nothing brings about are NaN or
    infinite.

    Args:
        first: the run in whose nodes the layer is said. run: the batch's.
        wanted: the original's sum, narrowed to the entries that stay.
    """
    if layer.sum is None:
        return wanted
    rest = twin(layer.sum, first, run).args[layer.rest]
    assert isinstance(rest, fx.Node)
    wanted = wanted - run.evaluate(rest)
    steps = [twin(node, first, run) for node in (layer.node, *layer.path)]
    for given, node in reversed(list(itertools.pairwise(steps))):
        operands = arguments(node).items()
        wanted = back(
            node, wanted, {name: None if item is given else run.evaluate(item) for name, item in operands}
        )
    return wanted
