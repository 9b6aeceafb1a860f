"""Text for people: what a surgery found, and a table of a model before and after."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from surgeon.capture.inputs import input_name
from surgeon.coupling.analysis import Analysis
from surgeon.coupling.frozen import FrozenGroup
from surgeon.coupling.groups import Group
from surgeon.graph.messages import where
from surgeon.selection.cost import ShapeModel, nothing

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 3  # tensors named per line


def describe(model: nn.Module, analysis: Analysis, shapes: ShapeModel, remarks: Sequence[str] = ()) -> str:
    """Groups, what is frozen and why, MACs and params; one line per group, reasons once each."""
    all_stay = nothing(analysis.solution)
    lines = [
        f"{type(model).__name__}: {count(shapes.params(all_stay))} params, {count(shapes.macs(all_stay))} MACs on "
        + ", ".join(
            f"{input_name(model, path)} {node.meta['spec'].shape}" for path, node in analysis.graph.inputs
        )
    ]
    lines += [f"note: {remark}" for remark in remarks]
    lines.append(f"{len(analysis.groups)} groups of channels that may leave:")
    lines += alike([(group.name, _group_line(group)) for group in analysis.groups])
    lines.append("frozen:")
    lines += _frozen_lines(analysis.frozen)
    return "\n".join(lines)


def alike(named: Sequence[tuple[str, str]]) -> list[str]:
    """Of lines that differ in numbers of layers alone, the first one, and how many there are up to which
    name.
    """
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, line in named:
        found[re.sub(r"\d+(?=\.)", "*", line)].append((name, line))
    return [
        entries[0][1]
        + (f"; and {len(entries) - 1} alike, up to {entries[-1][0]}" if len(entries) > 1 else "")
        for entries in found.values()
    ]


def _group_line(group: Group) -> str:
    text = f"  {group.name}: {group.width} channels"
    if group.steps != group.width:
        text += f" in {group.steps} steps" + (f" of {len(group.sets)} units" if len(group.sets) > 1 else "")
    others = [f"{tensor}[{dim}]" for tensor, dim in group.slots if f"{tensor}[{dim}]" not in group.name]
    if others:
        text += (
            ", with "
            + ", ".join(others[:_SHOWN])
            + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else "")
        )
    return text


def _frozen_lines(frozen: Sequence[FrozenGroup]) -> list[str]:
    by_reason: dict[str, list[FrozenGroup]] = defaultdict(list)
    for item in frozen:
        by_reason[item.reason].append(item)
    lines = []
    for reason, items in by_reason.items():
        slots = [f"{tensor}[{dim}]" for item in items for tensor, dim in item.slots]
        text = (
            f"  {reason}: "
            + ", ".join(slots[:_SHOWN])
            + (f" and {len(slots) - _SHOWN} more" if len(slots) > _SHOWN else "")
        )
        node = items[0].node
        lines.append(
            text + (f" (first at {where(node)})" if node is not None and node.op == "call_function" else "")
        )
    return lines


def count(number: float) -> str:
    """1234567 -> '1.23M'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def table(rows: Sequence[tuple[str, str, str, str]], title: str) -> Table:
    """A rich table of (what, before, after, share) rows."""
    from rich.table import Table

    made = Table(title=title)
    made.add_column("")
    for name in ("before", "after", "after / before"):
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def text(made: Table, width: int = 110) -> str:
    """A rich table as plain text."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(made)
    return out.getvalue()
