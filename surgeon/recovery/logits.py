"""Attention logits: where dims within heads were cut, queries aim at the products with keys that the original
has.

Per head, with q and k of the original and P the dims that stay: k is nearest to k_P M with M = C_PP^-1 C_P:
of C = E k^T k, so the logits q k^T are nearest to (q M^T) k_P^T. The layer that makes the queries therefore
aims at q M^T instead of q_P. Between that layer and the product may be nothing but moves and a scale: rotary
embeddings and norms of queries let no mixture through.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.capture.recording.aliasing import getitem
from surgeon.criteria.data.consumers import moving
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.table import Family, Trait, family, has, info, op_name, product
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import Layer
from surgeon.recovery.runs.paired_run import twin
from surgeon.recovery.runs.recording import Pair

_RIDGE = 1e-9


@dataclasses.dataclass(frozen=True)
class Product:
    """Queries times keys in one run: both as [N, heads, positions, dims] (keys as [N, heads, dims, positions]
    if `turned`).
    """

    queries: fx.Node
    keys: fx.Node
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(heads, dims)."""
        _, heads, _, dims = spec(self.queries).shape
        return heads, dims


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A layer that makes queries: the steps from its product to them in the small run, and their product with
    keys in the original's."""

    path: tuple[fx.Node, ...]
    big: Product


def find_meetings(small: Graph, big: Graph, layers: list[Layer]) -> dict[Layer, Meeting]:
    """The layers that make queries of fewer dims for as many heads, as far as there are only moves and scales
    behind them.
    """
    ours, theirs = _products(small), _products(big)
    if len(ours) != len(theirs):
        return {}
    makers = {layer.node: layer for layer in layers}
    found = {}
    for mine, other in zip(ours, theirs, strict=True):
        (heads, dims), (heads_before, dims_before) = mine.shape, other.shape
        path = _path(mine.queries, makers)
        if heads == heads_before and dims < dims_before and path and mine.turned == other.turned:
            found[makers[path[0]]] = Meeting(tuple(path[1:]), other)
    return found


def _products(graph: Graph) -> list[Product]:
    moves = moving(graph)
    found = []
    for node in graph.fx.nodes:
        products = product(node)
        if products is None or Trait.SCORES not in info(node).traits:
            continue
        left, right = products.steps[0].operands
        queries, keys = (_whole(arguments(node)[operand.name]) for operand in (left, right))
        if queries in moves and keys in moves and len(spec(queries).shape) == 4 == len(spec(keys).shape):
            turned = right.with_any(products.steps[0].summed) != [len(right.dims) - 1]
            found.append(Product(queries, keys, turned))
    return found


def _whole(node: fx.Node) -> fx.Node:
    """The value of four dims that an operand of a batched product was flattened from."""
    while node.op == "call_function" and _flattens(op_name(node)) and len(spec(node).shape) < 4:
        before: Any = node.args[0]
        node = before
    return node


def _flattens(name: str) -> bool:
    """Whether an op may stand between [N, heads, T, dims] and a batched product."""
    return has(name, Trait.RESHAPES) or has(name, Trait.COPIES) or has(name, Trait.REPEATS)


def _path(node: fx.Node, makers: dict[fx.Node, Layer]) -> list[fx.Node]:
    """From a layer's product to a node, through moves and scales; empty if there is more between, or if
    others read it.
    """
    found = [node]
    while node not in makers:
        before: Any = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(before, fx.Node) or not (_moves(node) or _scales(node)):
            return []
        if any(user is not node and not (_takes_part(user) and _takes_part(node)) for user in before.users):
            return []
        found.append(before)
        node = before
    return found[::-1]


def _moves(node: fx.Node) -> bool:
    return (
        node.target is getitem or family(op_name(node)) is Family.MOVEMENT or has(op_name(node), Trait.COPIES)
    )


def _scales(node: fx.Node) -> bool:
    return has(op_name(node), Trait.SCALES) and not isinstance(node.args[1], fx.Node)


def _takes_part(node: fx.Node) -> bool:
    return node.target is getitem or op_name(node) == "select" or has(op_name(node), Trait.SLICES)


class LogitTarget:
    """What a layer that makes queries should give: see above.

    Args:
        pairs: the batches; those to learn from say what C is.
    """

    def __init__(self, meeting: Meeting, kept_entries: KeptEntries, pairs: list[Pair]) -> None:
        self.meeting, self.first = meeting, pairs[0]
        inner: Any = 0
        for pair in pairs:
            if not pair.held:
                keys = self._keys(pair)
                inner = inner + (keys.transpose(2, 3) @ keys).sum(0)
        stays = self._stays(kept_entries)
        rows = torch.arange(len(stays), device=stays.device)[:, None]
        cross = inner[rows, stays]  # [heads, dims that stay, dims]
        square = cross.gather(2, stays[:, None].expand(-1, stays.shape[1], -1))
        ridge = _RIDGE * square.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
        eye = torch.eye(square.shape[1], dtype=square.dtype, device=square.device)
        self.map = torch.linalg.solve(square + ridge * eye, cross).transpose(
            1, 2
        )  # [heads, dims, dims that stay]

    def __call__(self, wanted: Tensor, pair: Pair) -> Tensor:
        """The narrowed result of the original's layer, with other numbers where the queries are."""
        queries = pair.big.value(self._twin(self.meeting.big.queries, pair))
        aimed = (queries.double() @ self.map).to(wanted.dtype)
        places: Any = torch.arange(wanted.numel(), device=wanted.device).reshape(wanted.shape)
        scale = 1.0
        for step in self.meeting.path:
            node: Any = twin(step, self.first.small, pair.small)
            if _scales(node):
                scale = node.target(scale * torch.ones(()), *node.args[1:]).item()
            else:
                places = node.target(places, *node.args[1:], **node.kwargs)
        return (
            wanted.flatten().index_copy(0, places.flatten(), (aimed / scale).flatten()).reshape(wanted.shape)
        )

    def _twin(self, node: fx.Node, pair: Pair) -> fx.Node:
        return twin(node, self.first.big, pair.big)

    def _keys(self, pair: Pair) -> Tensor:
        """[samples, heads of queries, positions, dims], in float64."""
        keys = pair.big.value(self._twin(self.meeting.big.keys, pair)).double()
        keys = keys.transpose(2, 3) if self.meeting.big.turned else keys
        return keys.repeat_interleave(self.meeting.big.shape[0] // keys.shape[1], 1)

    def _stays(self, kept_entries: KeptEntries) -> Tensor:
        """Which dims of each head's queries stay, [heads, dims]."""
        node = self.meeting.big.queries
        value = self.first.big.value(node)
        numbers = torch.arange(value.shape[-1], device=value.device).expand(value.shape)
        return kept_entries(node, numbers)[0, :, 0]
