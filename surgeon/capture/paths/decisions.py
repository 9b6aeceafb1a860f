"""What the model's Python code decided by, collected while it ran: values of tensors, sizes.

A decision counts if another input, or other weights, could make it go another way, and if the code does more with it
than check it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from surgeon.capture.paths.source_tests import holds_a_test, only_checks
from surgeon.capture.value_dependent import draws
from surgeon.graph.graph import Decision, Graph, spec
from surgeon.graph.messages import source_line
from surgeon.ops.table import op_name


def reads_a_value(op: Any) -> bool:
    """Whether an op tells Python, or another op, something about the values of a tensor."""
    return torch.Tag.data_dependent_output in op.tags  # `x.item()`, `bool(x)`, `torch.equal`


def note_value(node: fx.Node, result: Any, source: tuple[str, int] | None) -> None:
    """Write down at a node that something about its value was read."""
    if source is not None:
        said = "a value" if isinstance(result, bool) else "a number that was read from a tensor"
        node.meta.setdefault("decisions", []).append(Decision("value", said, str(result)[:20], source, node))


def note_parts(node: fx.Node | None, dim: int, result: Any, source: tuple[str, int] | None) -> None:
    """Write down that Python got parts of a tensor, as many as a dim holds, where it compares."""
    if node is not None and source is not None and holds_a_test(*source):
        made = Decision("size", f"{len(result)} parts", "", source, node, dim)
        node.meta.setdefault("decisions", []).append(made)


def note_left(node: fx.Node | None, how: str, source: tuple[str, int] | None) -> None:
    """Write down that all values of a tensor left torch: whatever the code decides by them is not seen."""
    if node is not None and source is not None:
        made = Decision("value", f"values that left torch by {how}", "", source, node)
        node.meta.setdefault("decisions", []).append(made)


def without_entries(graph: Graph) -> Iterator[str]:
    """Where nothing was left to compute with, as no entry was selected or an input has none."""
    for _, node in graph.inputs:
        if 0 in spec(node).shape:
            yield f"an input has no entries (its shape is {spec(node).shape}), so that nothing computed from it was seen"
    for node in graph.fx.nodes:
        if (
            node.op == "call_function"
            and node.users
            and torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
        ):
            found = spec(node)
            if 0 in found.shape and found.dtype.is_floating_point:
                yield f"no entry was selected at {source_line(node.meta['source'])}, so that nothing computed from it was seen"


def note_length(node: fx.Node | None, result: Any, source: tuple[str, int] | None) -> None:
    """Write down that Python got the length of a tensor (a plain number, whatever is returned) where it compares."""
    if node is not None and source is not None and holds_a_test(*source):
        made = Decision("size", f"length {result}", "", source, node, 0)
        node.meta.setdefault("decisions", []).append(made)


def decisions_of(graph: fx.Graph, owned: Iterable[str]) -> tuple[Decision, ...]:
    """The decisions noted at the nodes of a graph, once each."""
    moving = _moving(graph, frozenset(owned))
    found: dict[tuple[Any, ...], Decision] = {}
    for node in graph.nodes:
        for decision in node.meta.pop("decisions", ()):
            if decision.kind == "value" and node not in moving:
                continue
            if decision.source is not None and only_checks(*decision.source):
                continue
            found.setdefault((decision.kind, decision.source, node, decision.dim), decision)
    return tuple(found.values())


_BY_SIZE = frozenset(("arange", "linspace"))  # positions, as many as an input is long


def _moving(graph: fx.Graph, owned: frozenset[str]) -> set[fx.Node]:
    """Values that other inputs, longer ones too, draws or weights would change."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.op == "placeholder"
            or "of_sizes" in node.meta
            or (node.op == "call_function" and (draws(op_name(node)) or op_name(node) in _BY_SIZE))
        ):
            found.add(node)
        elif node.op == "get_attr":
            if node.target in owned and spec(node).dtype.is_floating_point:
                found.add(node)
        elif not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def said(decisions: Iterable[Decision], varies: Callable[[fx.Node, int], bool]) -> Iterator[str]:
    """A sentence for each place in the code that decided by a value or a size.

    Args:
        varies: whether the size of a node's dim hangs on the inputs; the others are the model's own.
    """
    lines: dict[Any, Decision] = {}
    for decision in decisions:
        if decision.kind == "mode" or (
            decision.kind == "size" and decision.node is not None and not varies(decision.node, decision.dim)
        ):
            continue
        lines.setdefault(decision.source or decision.what, decision)
    for decision in lines.values():
        what = decision.what if decision.kind == "value" else f"a size ({decision.what})"
        place = f" at {source_line(decision.source)}" if decision.source else ""
        yield (
            f"the code decided by {what}{place}: it was {decision.went}"
            if decision.went
            else f"the code may decide by {what}{place}"
        )
