"""Holding one run of a model against another, op by op: which ops count, and which are the same."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgeon.graph import spec

ALIKE = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view", "unsafe_split": "split"}
OPTIONAL = {"clone", "alias", "detach", "contiguous"}  # run or not by how a tensor lies in memory


def alike(op: Any) -> str:
    """One name for ops that differ only by how a tensor lies in memory."""
    name: str = op._schema.name.removeprefix("aten::")
    return ALIKE.get(name, name)


def of_whole_numbers(node: fx.Node) -> bool:
    """Whether an op works on whole numbers: it has no size to mend, and code may remember its result and not run it again."""
    inputs = [spec(n) for n in node.all_input_nodes] or [spec(node)]
    return not any(s is not None and s.dtype.is_floating_point for s in inputs)
