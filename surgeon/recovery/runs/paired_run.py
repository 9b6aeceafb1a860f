"""PairedRun: the original and the small model run side by side over all batches, op by op, on their recorded
graphs.

Between two ops the small model's weights may change: everything before them has run, everything after them
will run with the new ones. Each op runs once per batch, and a value lives until its last reader has run, so a
pass costs what one run of both models costs, and memory holds the values that are alive at one op, for all
batches at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree
from torch import Tensor, fx

from surgeon.capture.meta_run import to_meta
from surgeon.capture.recording.aliasing import getitem
from surgeon.capture.value_dependent import replay
from surgeon.errors import InputError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.queries import is_read
from surgeon.graph.tensors import tensor_leaves
from surgeon.ops.table import Family, Trait, family, info, op_name, product


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


def twin(node: fx.Node, first: PairedRun, other: PairedRun) -> fx.Node:
    """The node of another run of the same path."""
    found: fx.Node = other.nodes[first.place[node]]
    return found
