"""token_tables(graph, ...) -> the tables that a model's inputs look up: embeddings of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.ops.table import Family, Trait, family, has, op_name


def token_tables(graph: Graph, ids: list[int], asked: Sequence[str] | None) -> list[str]:
    """Names of the tables that inputs look up, with one number of rows."""
    found = dict.fromkeys(str(table.target) for table, _ in lookups(graph))
    if asked is not None:
        named = [asked] if isinstance(asked, str) else list(asked)
        wrong = next((name for name in named if name not in found), None)
        if wrong is not None or not named:
            raise InputError(
                f"no input looks up '{wrong}'" if named else "tables names none",
                fix=f"use some of {', '.join(found)}" if found else "pass inputs that are token ids",
            )
    else:
        named = [name for name in found if graph.tensors[name].shape[0] > ids[-1]] or list(found)
    if not named:
        raise InputError(
            "no table of this model is looked up by its inputs",
            fix="pass token ids as example_inputs, as the model takes them",
        )
    if len({graph.tensors[name].shape[0] for name in named}) > 1 or (asked is None and len(named) > 1):
        listed = ", ".join(f"{name} {tuple(graph.tensors[name].shape)}" for name in named)
        raise InputError(
            "several tables are looked up by inputs", where=listed, fix=f"name them: tables=[{named[0]!r}]"
        )
    return named


def lookups(graph: Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(table, input) of every lookup in a tensor of the model by what is an input, moved or converted."""
    for node in graph.fx.nodes:
        if node.op == "call_function" and has(op_name(node), Trait.LOOKS_UP):
            table, index = node.all_input_nodes[:2]
            while index.op == "call_function" and _passes(index):
                index = index.all_input_nodes[0]
            if table.op == "get_attr" and table.target in graph.owned and index.op == "placeholder":
                yield table, index


def _passes(node: fx.Node) -> bool:
    name = op_name(node)
    moved = family(name) is Family.MOVEMENT or has(name, Trait.COPIES) or has(name, Trait.INCIDENTAL)
    return moved and len(node.all_input_nodes) == 1
