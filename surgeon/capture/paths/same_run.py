"""adds_nothing(run, known): whether a run computes nothing but what other runs on the same inputs do.

Values are numbered by what they are computed from, so the order of ops does not count. Batch norms count as the
same whether they take their own statistics or the batch's: what they tie is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.capture.aligned_run import of_whole_numbers
from surgeon.graph.graph import Graph
from surgeon.ops.table import Trait, has, op_name

_STATISTICS = 5  # arguments of a batch norm that are tensors; modes and momentum come after them
_ROUNDINGS = 1 << 10  # by how many roundings of the largest entry two runs may differ
_COMPARED = 1 << 20  # entries of constants that are looked at


def adds_nothing(run: Graph, known: Iterable[Graph]) -> bool:
    """Whether each value that `run` computes, and each output, is one of a known run's; some false noes."""
    numbers: dict[Any, int] = {}
    for graph in known:
        _number(graph, numbers)
    count = len(numbers)
    found = _number(run, numbers)
    live = [node for _, node in run.outputs]
    computed = (n for n in run.fx.nodes if n.op == "call_function" and not of_whole_numbers(n))
    return all(found[node] < count for node in (*live, *computed))


def gives_the_same(run: Graph, other: Graph) -> bool:
    """Whether two runs on the same inputs give the same outputs, up to rounding."""
    if run.results is None or other.results is None:
        raise ValueError("a run that computed no results is compared")
    return len(run.results) == len(other.results) and all(map(_close, run.results, other.results))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or a.layout is not torch.strided:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    scale = float(a.abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=_ROUNDINGS * torch.finfo(a.dtype).eps * scale, equal_nan=True)


def _number(graph: Graph, numbers: dict[Any, int]) -> dict[fx.Node, int]:
    """node -> the number of its value."""
    found: dict[fx.Node, int] = {}
    places = {node: place for place, (_, node) in enumerate(graph.inputs)}
    for node in graph.fx.nodes:
        if node.op == "output":
            continue
        key = places[node] if node in places else _key(node, graph, found)
        found[node] = numbers.setdefault(key, len(numbers))
    return found


def _key(node: fx.Node, graph: Graph, found: dict[fx.Node, int]) -> Any:
    if node.op == "get_attr":
        name = str(node.target)
        return ("tensor", name) if name in graph.owned else ("constant", *_content(graph.tensors[name], name))
    name, args = op_name(node), node.args
    if has(name, Trait.BATCH_NORM):
        return Trait.BATCH_NORM, _said(args[:_STATISTICS], found)
    return str(node.target), _said(args, found), _said(node.kwargs, found)


def _content(tensor: Tensor, name: str) -> tuple[Any, ...]:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() > _COMPARED:
        return name, id(tensor)
    data = tensor.detach().cpu().contiguous().view(torch.uint8) if tensor.dim() else tensor.item()
    digest = hashlib.sha256(data.numpy().tobytes()).digest() if isinstance(data, Tensor) else repr(data)
    return tuple(tensor.shape), str(tensor.dtype), digest


def _said(item: Any, found: dict[fx.Node, int]) -> Any:
    """An argument as something that can be compared and has a hash."""
    if isinstance(item, fx.Node):
        return "value", found[item]
    if isinstance(item, list | tuple):
        return tuple([_said(part, found) for part in item])
    if isinstance(item, dict):
        return tuple([(key, _said(value, found)) for key, value in sorted(item.items())])
    return repr(item)
