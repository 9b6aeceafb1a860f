"""What the model's Python code decided by, collected while it ran: values of tensors, sizes.

A decision counts if another input, or other weights, could make it go another way, and if the code does more with it
than check it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx

from surgeon.capture.paths.source_tests import holds_a_test, only_checks
from surgeon.capture.value_dependent import draws
from surgeon.graph.graph import Decision, spec
from surgeon.graph.messages import source_line
from surgeon.ops.table import op_name

_READS = frozenset(
    ("_local_scalar_dense", "is_nonzero", "equal")
)  # `bool(x)`, `x.item()`, `torch.equal`, and what is made of them


def reads_a_value(op: Any) -> bool:
    """Whether an op tells Python, or another op, something about the values of a tensor."""
    return str(op._schema.name).removeprefix("aten::") in _READS


def note_value(node: fx.Node, result: Any, source: tuple[str, int] | None) -> None:
    """Write down at a node that something about its value was read."""
    if source is not None:
        said = "a value" if isinstance(result, bool) else "a number that was read from a tensor"
        node.meta.setdefault("decisions", []).append(Decision("value", said, str(result)[:20], source, node))


def note_length(node: fx.Node | None, result: Any, source: tuple[str, int] | None) -> None:
    """Write down that Python got the length of a tensor (a plain number, whatever is returned) where it compares."""
    if node is not None and source is not None and holds_a_test(*source):
        made = Decision("size", f"length {result}", "as it is", source, node, 0)
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
        if node.op == "placeholder" or (
            node.op == "call_function" and (draws(op_name(node)) or op_name(node) in _BY_SIZE)
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
        yield f"the code decided by {what}{place}: it was {decision.went}"
