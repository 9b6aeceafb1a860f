"""numbers_beside_paths(small, graph) -> edits: numbers in lists of dicts that also name modules, such as timm's
`feature_info`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from surgeon.graph.graph import Graph
from surgeon.graph.module_tree import named_modules
from surgeon.mend.attribute_path import get_path
from surgeon.mend.edits import Edit


def numbers_beside_paths(small: nn.Module, graph: Graph) -> Iterator[Edit]:
    """Numbers in a list of dicts that also name modules (`{"module": "layer1", "num_chs": 64}`): how many channels
    those give, if it is so in each of the dicts.
    """
    for path, module in named_modules(small):
        for name, value in vars(module).items():
            if type(value) in (list, tuple) and value and all(isinstance(item, dict) for item in value):
                for key in set.intersection(*map(set, value)):
                    yield from _told_by_modules(
                        small, graph, path, f"{name}.{{}}.{key}", [d[key] for d in value], value
                    )


def _told_by_modules(
    small: nn.Module, graph: Graph, path: str, name: str, numbers: list[Any], beside: Sequence[dict[Any, Any]]
) -> Iterator[Edit]:
    pairs = []
    for number, held in zip(numbers, beside, strict=True):
        inner = (f"{path}.{item}".strip(".") for item in held.values() if isinstance(item, str) and item)
        known = [pair for pair in (_channels(small, graph, at) for at in inner) if pair is not None]
        if type(number) is not int or not any(pair[0] == number for pair in known):
            return
        pairs.append(next(pair for pair in known if pair[0] == number))
    for place, (old, new) in enumerate(pairs):
        if old != new:
            yield Edit(path, "attribute", name.format(place), old, new)


def _channels(small: nn.Module, graph: Graph, path: str) -> tuple[int, int] | None:
    """How many channels the last layer in a module gave, and gives: rows of the last tensors that ran there."""
    names = [str(n.target) for n in graph.fx.find_nodes(op="get_attr")]
    inside = [name for name in names if name.startswith(f"{path}.") and name in graph.owned]
    if not inside:
        return None
    held: Any = get_path(small, inside[-1])
    return (graph.tensors[inside[-1]].shape[0], held.shape[0]) if isinstance(held, Tensor) else None
