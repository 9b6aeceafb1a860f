"""Lockstep: the original and the small model run side by side over all batches, op by op, on their recorded
graphs.

Between two ops the small model's weights may change: everything before them has run, everything after them
will run with the new ones. Each op runs once per batch, and a value lives until its last reader has run, so a
pass costs what one run of both models costs, and memory holds the values that are alive at one op, for all
batches at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree
from torch import Tensor, fx, nn

from surgeon.capture.aligned_run import alike
from surgeon.capture.batches import Batch, record
from surgeon.capture.meta_run import to_meta
from surgeon.capture.recording.aliasing import getitem
from surgeon.capture.value_dependent import replay
from surgeon.errors import InputError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.queries import is_read
from surgeon.graph.tensors import as_real, tensor_leaves
from surgeon.ops.table import Family, Trait, family, info, op_name, product

_READS = frozenset(
    ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
)  # shapes and paths that values decide

Progress = Callable[[Iterable[Any], str], Iterable[Any]]  # wraps what is walked through, to show progress


class PairedRun:
    """One recorded run, executed node by node with the tensors' present values.

    Args:
        label: what to call its batch.
        taken: decisions (see `_decisions`) of another run that this one takes too, so that both give the same
            rows.

    Attributes:
        values: what is alive, by node.
        weights: tensors that stand for those of the graph, by name: steps that may lead anywhere, so nothing
            is refused.
    """

    def __init__(self, graph: Graph, label: str, taken: Mapping[fx.Node, fx.Node] | None = None) -> None:
        self.graph, self.label, self.taken = graph, label, taken or {}
        self.nodes = list(graph.fx.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.values: dict[fx.Node, Any] = {}
        self.weights: Mapping[str, Tensor] = {}
        self.readers = Counter(used for node in self.nodes for used in node.all_input_nodes)
        self.at = 0
        unique = {id(tensor): tensor for _, tensor in tensor_leaves((graph.args, graph.kwargs))}
        self._inputs = iter(unique.values())

    def pin(self, node: fx.Node) -> None:
        """Keep a node's value until it is released once more than the graph reads it."""
        self.readers[node] += 1

    def release(self, node: fx.Node) -> None:
        """Count one reader less of a value; without readers it is freed."""
        self.readers[node] -= 1
        if self.readers[node] <= 0:
            self.values.pop(node, None)

    def before(self, node: fx.Node) -> None:
        """Run everything that comes before a node."""
        while self.at < self.place[node]:
            self._step(self.nodes[self.at])
            self.at += 1

    def through(self, node: fx.Node) -> None:
        """Run everything up to a node, and the node."""
        self.before(node)
        if self.at == self.place[node]:
            self._step(node)
            self.at += 1

    def finish(self) -> list[Tensor]:
        """Run what is left, and give the outputs."""
        self.before(self.nodes[-1])
        return [self.value(node) for _, node in self.graph.outputs]

    def value(self, node: fx.Node) -> Tensor:
        """The value of a node: kept, or the tensor as it is now."""
        if node.op != "get_attr":
            found: Tensor = self.values[node]
            return found
        name = str(node.target)
        return self.weights[name] if name in self.weights else self.graph.tensors[name].detach()

    def evaluate(self, item: Any) -> Any:
        """The value of an operand, from what is alive and the tensors as they are now; numbers stand for
        themselves.
        """
        if not isinstance(item, fx.Node):
            return item
        if item.op == "get_attr" or item in self.values:
            return self.value(item)
        args, kwargs = torch.utils._pytree.tree_map_only(
            fx.Node, self.evaluate, (tuple(item.args), dict(item.kwargs))
        )
        return item.target(*args, **kwargs)  # type: ignore[operator]  # an op

    def _step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            given = next(self._inputs)
            self.values[node] = given.clone() if given.is_inference() and torch.is_grad_enabled() else given
        elif node.op == "call_function":
            args, kwargs = torch.utils._pytree.tree_map_only(
                fx.Node, self.value, (tuple(node.args), dict(node.kwargs))
            )
            found = (
                replay(self.taken[node], args, kwargs)
                if node in self.taken
                else _with_gradients(node, args, kwargs)
            )
            self.values[node] = node.target(*args, **kwargs) if found is None else found  # type: ignore[operator]  # an op
            if (
                not self.weights
                and node.target is not getitem
                and family(op_name(node)) is Family.CONTRACTION
            ):
                self._check(node, args, kwargs)
            for used in node.all_input_nodes:
                self.release(used)
            if not self.readers[node]:
                del self.values[node]

    def _check(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse activations that are NaN or infinite, at the first product that gives them; masked logits
        may be -inf.
        """
        value = self.values[node]
        first = value[0] if isinstance(value, list | tuple) else value
        if bool(torch.isfinite(first.sum())):
            return
        odd = ~torch.isfinite(first)
        products = product(node)
        for operand in products.added if products is not None else ():  # what the product is added to
            if not operand.dims:
                odd &= ~torch.isneginf(Arguments(node.target, args, kwargs)[operand.name])
        if bool(odd.any()):
            raise InputError(
                f"{self.label} gives activations that are NaN or infinite",
                where=where(node),
                fix="leave this batch out, or look for what overflows in the model",
            )

    @property
    def bytes(self) -> int:
        """Of all values that are alive."""
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for _, t in tensor_leaves(list(self.values.values()))
        }
        return sum(found.values())


def _with_gradients(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | tuple[Tensor] | None:
    """What ops give that torch cannot differentiate as they are; None where no gradients are wanted, and of
    other ops.
    """
    if not torch.is_grad_enabled():
        return None
    if op_name(node) == "copy":  # only the one in place has a gradient
        written: Tensor = args[0].detach().clone()
        return written.copy_(args[1])
    return _attended(node, args, kwargs) if Trait.ATTENTION in info(node).traits else None


def _attended(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor] | None:
    """The results of fused attention, by the function that has all gradients; None if others than the first
    are read.

    The kernel that was recorded need not have the gradient of a mask that is learned, nor keep what gradients
    are computed from.
    """
    schema = node.target._schema  # type: ignore[union-attr]  # an op
    if any(is_read(node, number) for number in range(1, len(schema.returns))):
        return None
    given, products = Arguments(node.target, args, kwargs), product(node)
    assert products is not None
    query, key, value = (given[operand.name] for operand in products.operands)
    options = {name: given[name] for name in ("dropout_p", "is_causal", "scale") if name in given}
    mask = next((given[operand.name] for operand in products.steps[0].added), None)
    grouped = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped, **options)
    with torch.no_grad():
        like = node.target(*to_meta(args), **to_meta(kwargs))[0]  # type: ignore[operator]  # an op
    order = sorted(
        range(like.dim()), key=like.stride, reverse=True
    )  # views behind it count on how it lies in memory
    return (found.permute(order).contiguous().permute([order.index(dim) for dim in range(like.dim())]),)


@dataclasses.dataclass
class Pair:
    """One batch, recorded on both models; `held` batches are not learned from, they judge."""

    big: PairedRun
    small: PairedRun
    held: bool


class Recording:
    """The batches as graphs: every shape of input is recorded once, or every batch if the run takes decisions
    that data make.

    Attributes:
        big, small: the first batch's graphs, in whose nodes everything is said.
    """

    def __init__(
        self, model: nn.Module, small: nn.Module, batches: Sequence[Batch], held: Sequence[bool]
    ) -> None:
        self._batches, self.held = batches, held
        self._models = model, small
        self._known: dict[Any, tuple[Graph, Graph]] = {}
        self.big, self.small = self._graphs(0)

    def pairs(self) -> list[Pair]:
        """Fresh runs of every batch."""
        return [self.pair(number) for number in range(len(self._batches))]

    @torch.no_grad()
    def distance(self) -> float:
        """How far the small model is from the original now, on the held batches."""
        return distance([pair for pair in self.pairs() if pair.held])

    def pair(self, number: int) -> Pair:
        """Fresh runs of one batch."""
        big, small = self._graphs(number)
        args, kwargs = self._batches[number]
        fed = [dataclasses.replace(graph, args=args, kwargs=kwargs) for graph in (big, small)]
        label = f"batch {number + 1}"
        taken = dict(zip(_decisions(small), _decisions(big), strict=False))
        return Pair(PairedRun(fed[0], label), PairedRun(fed[1], label, taken), self.held[number])

    def _graphs(self, number: int) -> tuple[Graph, Graph]:
        args, kwargs = self._batches[number]
        key: Any = tuple((path, tuple(tensor.shape)) for path, tensor in tensor_leaves((args, kwargs)))
        found = self._known.get(number) or self._known.get(key)
        if found is None:
            found = self._record(args, kwargs, f"batch {number + 1}")
            reads = any(
                "decision" in call.node.meta or op_name(call.node) in _READS for call in found[0].calls
            )
            self._known[number if reads else key] = found
        return found

    def _record(self, args: Any, kwargs: Any, label: str) -> tuple[Graph, Graph]:
        fix = "let the batches be what the model takes, without targets"
        big, small = (record(model, args, kwargs, label, fix) for model in self._models)
        if hasattr(self, "small"):
            for ours, theirs in ((self.big, big), (self.small, small)):
                _check_path(ours, theirs, label)
        return big, small


def _decisions(graph: Graph) -> list[fx.Node]:
    return [call.node for call in graph.calls if "decision" in call.node.meta]


def _check_path(ours: Graph, theirs: Graph, label: str) -> None:
    """Refuse a batch that runs other ops."""
    mine, other = list(ours.fx.nodes), list(theirs.fx.nodes)
    for a, b in zip(mine, other, strict=False):
        if a.op != b.op or (a.op == "call_function" and _name(a) != _name(b)):
            break
    else:
        if len(mine) == len(other):
            return
        a = mine[min(len(mine), len(other)) - 1]
    raise InputError(
        f"{label} takes another path through the model's code than the first batch",
        where=where(a),
        fix="pass batches of one shape",
    )


def _name(node: fx.Node) -> str:
    return "getitem" if node.target is getitem else alike(node.target)


def twin(node: fx.Node, first: PairedRun, other: PairedRun) -> fx.Node:
    """The node of another run of the same path."""
    found: fx.Node = other.nodes[first.place[node]]
    return found


def outputs(pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    """What the original gives and what the small model gives, of each output of real or complex numbers;
    masked logits may well be -inf: left out."""
    for want, got in zip(map(as_real, pair.big.finish()), map(as_real, pair.small.finish()), strict=True):
        if want.is_floating_point() and want.shape == got.shape:
            known = torch.isfinite(want)
            yield want[known], got[known]


def distance(pairs: Iterable[Pair]) -> float:
    """Relative distance of the small model's outputs from the original's, root mean square over all of them.

    Raises:
        InputError: there are none.
    """
    off, size, count = 0.0, 0.0, 0
    for pair in pairs:
        for want, got in outputs(pair):
            count += want.numel()
            off += float((want.double() - got.double()).square().sum())
            size += float(want.double().square().sum())
    if not count:
        raise nothing_to_compare("the batches that are held out")
    return math.sqrt(off / max(size, 1e-300))


def nothing_to_compare(what: str) -> InputError:
    """The error for batches of which no output can be compared."""
    return InputError(
        "no output can be compared with the original's",
        where=what,
        why="whole numbers, such as those of classes, have no distance that could fall, and infinite values are left out",
        fix="recover a model that gives logits, without the argmax at its end",
    )
