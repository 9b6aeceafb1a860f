"""What the tensors of a run hold: each tensor object stands for a value, a node of the graph.

A view also knows how to read its value again from its base: a write through a view reaches the base by the
inverses of the views between them (`slice_scatter` and kin), and other views of that base are read again when they
are next used.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.call_stack import CallStack, user_line
from surgeon.capture.recording import aliasing
from surgeon.errors import CaptureError
from surgeon.graph.graph import HELD, Spec
from surgeon.graph.tensors import named_tensors

_NESTED = (Tensor, list, tuple)  # what arguments hold tensors in, and tensors
_CONST_LIMIT = 1 << 22  # integer values larger than this are not kept for index arithmetic


class Value:
    """What one tensor object holds now: a graph node, and how to read it again if its base was written to."""

    __slots__ = ("base", "index", "node", "op", "rest", "seen", "source", "version")

    def __init__(
        self, node: fx.Node | None, base: Value | None = None, op: Any = None, rest: Any = None
    ) -> None:
        self.node, self.base, self.op, self.rest = node, base, op, rest
        self.index: int | None = None
        self.source: fx.Node | None = None  # an op with several outputs, of which nothing has read this one
        self.version = 0  # bumped on the root by every write
        self.seen = 0  # the root's version that `node` shows

    def root(self) -> Value:
        value = self
        while value.base is not None:
            value = value.base
        return value


class Values:
    """The graph as it grows, and which node each tensor of the run holds.

    Attributes:
        tensors: the model's tensors by name, and constants that the run met.
        aliases: further names of tensors -> the first one.
        owned: names of the model's own tensors.
        stored: those that its state dict holds.
        inputs: (path, node) of the tensors among the run's inputs.
        last: the op that was recorded last.
        made: a tensor that the code has just made of Python's numbers; any other that the run has not met was there
            before it, in a list or a closure.
    """

    def __init__(self, model: nn.Module, stack: CallStack) -> None:
        self.graph, self.stack = fx.Graph(), stack
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        for name, tensor in named_tensors(model):
            first = self.names.setdefault(id(tensor), name)
            if first == name:
                self.tensors[name] = tensor
            else:
                self.aliases[name] = first
        self.owned = frozenset(self.tensors)
        kept = (t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor))
        self.stored = frozenset(self.names[id(t)] for t in kept if id(t) in self.names)
        self._known: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self.kept: list[Tensor] = []  # inputs and lifted constants, alive as long as the recorder
        self.inputs: list[tuple[str, fx.Node]] = []
        self.last: fx.Node | None = None
        self.made: Tensor | None = None
        self._ops = 0

    def lookup(self, tensor: Tensor) -> Value | None:
        """What a tensor holds; None if the run has not met it."""
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def bind(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), value)

    def placeholder(self, path: str, tensor: Tensor) -> None:
        """A tensor among the inputs of the run."""
        if self.lookup(tensor) is not None:
            return
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        node.meta.update(spec=spec_of(tensor), module="", source=None)
        self.kept.append(tensor)
        self.inputs.append((path, node))
        self.bind(tensor, Value(node))

    def of(self, tensor: Tensor) -> Value:
        """What a tensor holds; one that the run has not met is a tensor of the model or a constant."""
        value = self.lookup(tensor)
        if value is not None:
            return value
        name = self.names.get(id(tensor))
        if name is None:
            kind = "_constant_" if tensor is self.made else HELD
            name = f"{kind}{len(self.tensors) - len(self.owned)}"
            self.tensors[name] = tensor.detach().clone()
            self.kept.append(tensor)
        node = self.graph.create_node("get_attr", name, name=f"tensor_{len(self._known)}")
        node.meta.update(spec=spec_of(tensor), module="", source=None)
        if is_index(tensor):
            node.meta["const"] = self.tensors[name].detach().clone()
        value = Value(node)
        self.bind(tensor, value)
        return value

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that holds a tensor now; None for tensors that the run has not met."""
        value = self.lookup(tensor)
        return None if value is None else self.node(value)

    def node(self, value: Value) -> fx.Node:
        """The node that holds `value` now; views of a base that was written to are read again."""
        if value.node is None and value.source is not None and value.index is not None:
            value.node = self.item(value.source, value.index)
        if value.base is not None:
            version = value.root().version
            if value.seen != version:
                node = self.emit(
                    value.op, (self.node(value.base), *value.rest[0]), value.rest[1], value.rest[2]
                )
                if value.node is not None and "layout" in value.node.meta:
                    node.meta["layout"] = value.node.meta["layout"]
                value.node = node if value.index is None else self.item(node, value.index)
                value.seen = version
        assert value.node is not None
        return value.node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One output of an op that has several."""
        for user in node.users:
            if user.target is aliasing.getitem and user.args[1] == index:
                return user
        item = self.graph.create_node(
            "call_function", aliasing.getitem, (node, index), name=f"{node.name}_{index}"
        )
        specs = node.meta["spec"]
        item.meta.update(spec=specs[index], module=node.meta["module"], source=node.meta["source"])
        return item

    def emit(self, op: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        """A new node, at the place in the user's code that runs."""
        name = f"op_{self._ops}"  # given, so that none is derived
        node = self.graph.create_node("call_function", op, name=name)
        node.args = args  # set here: arguments are not looked through for symbols, of which there are none
        if kwargs:
            node.kwargs = kwargs
        node.meta.update(spec=spec, module=self.stack.current, source=user_line())
        self.last, self._ops = node, self._ops + 1
        return node

    def nodes(self, item: Any) -> Any:
        """Arguments of an op, with nodes in the place of tensors."""
        if isinstance(item, Tensor):
            return self.node(self.of(item))
        if isinstance(item, list | tuple):
            made = [self.nodes(x) if isinstance(x, _NESTED) else x for x in item]
            return made if type(item) is list else tuple(made)
        return item

    def assign(self, target: Tensor, source: Tensor) -> None:
        """`target.data = source`: it holds another value from now on, which loses entries with what it
        was.
        """
        old, node = self.node(self.of(target)), self.node(self.of(source))
        if target.shape == source.shape:
            node = self.emit(torch.ops.aten.copy.default, (old, node), {}, spec_of(source))
        self.bind(target, Value(node))

    def write(self, tensor: Tensor, node: fx.Node) -> None:
        """A tensor was written to: it holds another value, and so does all that it is a view of."""
        value = self.of(tensor)
        value.node = node
        while value.base is not None:
            base = value.base
            old = self.node(base)
            base_spec = old.meta["spec"]
            inverse = aliasing.scatter(value.op, old, value.node, value.rest[0], value.index, base_spec)
            if inverse is None:
                raise CaptureError(
                    f"cannot record a write through the view {value.op}",
                    where=self.stack.current,
                    why="surgeon has no inverse of this view",
                    fix="write to the tensor itself, or to a slice of it",
                )
            base.node = self.emit(inverse[0], inverse[1], inverse[2], base_spec)
            value = base
        value.version += 1
        self._mark(self.of(tensor), value.version)

    def _mark(self, value: Value | None, version: int) -> None:
        while value is not None:
            value.seen = version
            value = value.base


def spec_of(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype)


def specs_of(out: Any) -> Any:
    if isinstance(out, Tensor):
        return spec_of(out)
    if isinstance(out, list | tuple):
        return tuple(spec_of(item) if isinstance(item, Tensor) else None for item in out)
    return None


def is_index(tensor: Tensor) -> bool:
    return (
        not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.numel() <= _CONST_LIMIT
        and not tensor.is_meta
    )
