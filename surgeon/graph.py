"""The graph: what one run of a model did, as plain data.

A `Graph` wraps a pure `torch.fx.Graph` of ATen ops (no op writes to its inputs) together with the tensors that the
model owns and the order in which its ops were called. Every node carries its output `Spec`, the path of the module that
ran it and the user's source line. Nothing here depends on how the graph came to be (see `capture`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import linecache
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Call:
    """One ATen op as the model called it, in-place form and all: what a second run of the model is compared with.

    `within` is the number of the product (see `_sizes`) that ran it, 0 if none did.
    """

    op: Any
    node: fx.Node
    module: str
    source: tuple[str, int] | None
    within: int = 0


@dataclasses.dataclass(frozen=True)
class Graph:
    """A recorded run.

    Attributes:
        fx: the pure op graph. `node.meta` has `spec` (a `Spec`, or a tuple of them), `module`, `source`; some nodes have
            `const` (the value of an index tensor), `follows` (dims whose size the model's code computed from another one),
            `repeated` (the same of dims that were of size 1), `cuts` (parts of dims that are as long as was computed so),
            `derived` (torch computed the sizes), `decided` (dims whose size the model's code compared with a number), `decision`
            (what a deciding op gave, see `_decisions`), `layout` (strides and offset of what `as_strided` reads).
        tensors: every parameter, buffer and lifted constant by name, as `get_attr` nodes name them.
        owned: the names in `tensors` that belong to the model and may be sliced.
        stored: those of them that a state dict holds: parameters, and buffers that are persistent.
        aliases: other names of the same tensors (tied weights), alias -> name.
        hash: the `architecture` of the model.
        calls: the ops in the order in which they ran.
        outputs: (path, node) of each output tensor, e.g. ("logits", node).
        inputs: (path, node) of each input tensor.
        args, kwargs: the inputs of the run.
        assumed: what was assumed about the example inputs, "" if they were given.
        training: whether the run was in training mode.
        named: the names of the outputs that count, () if all do.
    """

    fx: torch.fx.Graph
    tensors: Mapping[str, Tensor]
    owned: frozenset[str]
    stored: frozenset[str]
    aliases: Mapping[str, str]
    hash: str
    calls: tuple[Call, ...]
    outputs: tuple[tuple[str, torch.fx.Node], ...]
    inputs: tuple[tuple[str, torch.fx.Node], ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    assumed: str = ""
    training: bool = False
    named: tuple[str, ...] = ()


def spec(node: fx.Node) -> Spec:
    """The spec of a node with one tensor output (the first one of several)."""
    found = node.meta["spec"]
    first: Spec = found[0] if isinstance(found, tuple) else found
    return first


def read_tensors(graph: Graph) -> set[str]:
    """The names of the tensors that the run read."""
    return {str(node.target) for node in graph.fx.find_nodes(op="get_attr")}


def nodes_inside(graph: Graph, path: str) -> list[fx.Node]:
    """The ops that ran in a module or below it."""

    def inside(module: str) -> bool:
        return path == "" or module == path or module.startswith(f"{path}.")

    return [node for node in graph.fx.nodes if node.op == "call_function" and inside(node.meta["module"])]


def where(node: fx.Node) -> str:
    """`op` in `module path` at `file:line: code`, for messages."""
    name = str(node.target).removesuffix(".default") if node.op == "call_function" else f"{node.op} {node.target}"
    module = node.meta.get("module", "")
    text = f"{name} in module '{module}'" if module else name
    line = source_line(node.meta.get("source"))
    return f"{text} at {line}" if line else text


def source_line(source: tuple[str, int] | None) -> str:
    """`file:line: code` of a (file, line) pair, with a short file name."""
    if source is None:
        return ""
    path, line = source
    code = linecache.getline(path, line).strip()
    short = os.sep.join(path.split(os.sep)[-2:])
    return f"{short}:{line}" + (f": {code}" if code else "")


def architecture(model: nn.Module) -> str:
    """A digest of the names, shapes and sharing of a model's parameters, and of the names of its buffers (whose shapes a run may
    change); not of their values."""
    first: dict[int, str] = {}
    lines = [type(model).__qualname__, *(name for name, _ in model.named_buffers(remove_duplicate=False))]
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(tensor), name)
        lines.append(f"{name}:{tuple(tensor.shape)}" if owner == name else f"{name}={owner}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, buffer and plain tensor attribute under every name that it has."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers, module.__dict__):
            for name, value in store.items():
                if isinstance(value, Tensor):
                    yield dot + name, value


def check_values(graph: Graph) -> None:
    """Refuse weights that no score and no proof can be computed from.

    Raises:
        InputError: a parameter holds NaN or inf, or another tensor NaN (masks may well hold inf).
    """
    for name, tensor in graph.tensors.items():
        if name not in graph.owned or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if bool(torch.isfinite(tensor.detach().sum())):  # one pass; a sum that overflows is looked at again
            continue
        given = isinstance(tensor, nn.Parameter)
        bad = ~torch.isfinite(tensor.detach()) if given else torch.isnan(tensor.detach())
        if bool(bad.any()) and not name.startswith("_"):
            raise InputError(
                "the model's weights hold NaN or inf",
                where=name,
                why="no score and no proof can be computed from them",
                fix="load sound weights, or repair them (see torch.nan_to_num)",
            )


def tensor_leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nest of dicts, lists, tuples, dataclasses and plain objects, with their paths."""
    yield from _leaves(value, path, set())


def named(leaves: list[tuple[str, Tensor]], names: Sequence[str] | None) -> list[tuple[str, Tensor]]:
    """Those of a model's outputs that have one of the names or lie below one; all if there are no names.

    Raises:
        InputError: a name is none of an output.
    """
    if names is None:
        return leaves
    found = [(path, tensor) for path, tensor in leaves if any(path == n or path.startswith(f"{n}.") for n in names)]
    for name in names:
        if not any(path == name or path.startswith(f"{name}.") for path, _ in found):
            known = ", ".join(repr(path) for path, _ in leaves[:20])
            raise InputError(f"the model has no output {name!r}", fix=f"use some of {known}")
    return found


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, along a last dim; other tensors as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _leaves(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    if value is None or isinstance(value, str | bytes | int | float | complex | bool) or id(value) in seen:
        return
    seen = seen | {id(value)}
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    elif dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        items = iter(vars(value).items())
    else:
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key), seen)


def is_read(node: fx.Node, output: int) -> bool:
    """Whether anything reads one of the outputs of an op that has several."""
    return any(user.target is operator.getitem and user.args[1] == output and user.users for user in node.users)
