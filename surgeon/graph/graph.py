"""The graph: what one run of a model did, as plain data.

A `Graph` wraps a pure `torch.fx.Graph` of ATen ops (no op writes to its inputs) together with the tensors
that the model owns and the order in which its ops were called. Every node carries its output `Spec`, the path
of the module that ran it and the user's source line. Nothing here depends on how the graph came to be (see
`capture`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

HELD = (
    "_held_"  # begins the names of constants that were there before the run: in a list, an object, a closure
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor value."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Call:
    """One ATen op as the model called it, in-place form and all: what a second run of the model is compared
    with.

    `within` is the number of the product (see `_sizes`) that ran it, 0 if none did.
    """

    op: Any
    node: fx.Node
    module: str
    source: tuple[str, int] | None
    within: int = 0


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where the model's own Python code decided what to run, and how: another run may go another way.

    Attributes:
        kind: "value" of a tensor, "size", or "mode" that holds for the whole process.
        what: what was looked at, such as "4 > 16" or "torch.is_grad_enabled()".
        went: the answer; "" if only what it was asked of is known.
        source: (file, line) of the user's code.
        node: the value that was looked at, None for a mode.
        dim: the dim of a size.
    """

    kind: str
    what: str
    went: str
    source: tuple[str, int] | None
    node: fx.Node | None = None
    dim: int = -1


@dataclasses.dataclass(frozen=True)
class Read:
    """Values that left torch, for NumPy or a list, say: what is made of them is not recorded.

    `node` holds them, None if the run did not make it; `value` is what they were.
    """

    how: str
    node: fx.Node | None
    value: Tensor
    source: tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class Graph:
    """A recorded run.

    Attributes:
        fx: the pure op graph. `node.meta` has `spec` (a `Spec`, or a tuple of them), `module`, `source`; some
            nodes have `const` (the value of an index tensor), `follows` (dims whose size the model's code
            computed from another one), `repeated` (the same of dims that were of size 1), `cuts` (parts of
            dims that are as long as was computed so), `derived` (torch computed the sizes), `decided` (dims
            whose size the model's code compared with a number), `decision` (what a deciding op gave, see
            `_decisions`), `layout` (strides and offset of what `as_strided` reads).
        tensors: every parameter, buffer and lifted constant by name, as `get_attr` nodes name them.
        owned: the names in `tensors` that belong to the model and may be sliced.
        stored: those of them that a state dict holds: parameters, and buffers that are persistent.
        aliases: other names of the same tensors (tied weights), alias -> name.
        hash: the `architecture` of the model.
        calls: the ops in the order in which they ran.
        outputs: (path, node) of each output tensor, e.g. ("logits", node).
        results: the values of the outputs; None if the run did not compute them.
        reads: values that left torch, in order.
        inputs: (path, node) of each input tensor.
        args, kwargs: the inputs of the run.
        assumed: what was assumed about the example inputs, "" if they were given.
        training: whether the run was in training mode.
        answers: (name, answer) of global modes about which the code was told something else than holds, such as
            ("torch.is_grad_enabled", True).
        number: which of several calls this is a run of, from 1; 0 if there is but one.
        named: the names of the outputs that count, () if all do.
        decisions: what the model's Python code decided by.
        rates: the rates that dropouts were called with, in order.
        by_mode: whether the model's code asked if it is in training mode; what torch's own batch norms and dropouts
            ask does not count.
        scaling: paths of modules that in training mode only scale samples (stochastic depth).
        rebuilt: tensors that the model's code makes anew while it runs (see `rebuilt_state`), with the line.
    """

    fx: torch.fx.Graph
    tensors: Mapping[str, Tensor]
    owned: frozenset[str]
    stored: frozenset[str]
    aliases: Mapping[str, str]
    hash: str
    calls: tuple[Call, ...]
    outputs: tuple[tuple[str, torch.fx.Node], ...]
    results: tuple[Tensor, ...] | None
    reads: tuple[Read, ...]
    inputs: tuple[tuple[str, torch.fx.Node], ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    assumed: str = ""
    training: bool = False
    answers: tuple[tuple[str, bool], ...] = ()
    number: int = 0
    named: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    rates: tuple[Any, ...] = ()
    by_mode: bool = True
    scaling: frozenset[str] = frozenset()
    rebuilt: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """What sets this run apart from the first one, for messages: " in training mode", say."""
        parts = [f" of call {self.number}"] if self.number > 1 else []
        parts += [" in training mode"] * self.training
        return "".join(parts + [f" where {name}() is {answer}" for name, answer in self.answers])


def spec(node: fx.Node) -> Spec:
    """The spec of a node with one tensor output (the first one of several)."""
    found = node.meta["spec"]
    first: Spec = found[0] if isinstance(found, tuple) else found
    return first
