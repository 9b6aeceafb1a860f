"""Recorder: a dispatch mode that writes the ATen ops of a running model into a pure graph.

Every tensor object stands for a value: a node, and for a view also how to read it again from its base. An
in-place op gives its target a new node; through the chain of views the write reaches the base
(`slice_scatter` and kin), and other views of that base are read again when they are next used.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture import aliasing as _views
from surgeon.capture.call_stack import CallStack, user_line
from surgeon.capture.meta_run import PlainMode
from surgeon.capture.paths.decisions import decisions_of, note_value, reads_a_value
from surgeon.capture.value_dependent import decides, decision
from surgeon.errors import CaptureError
from surgeon.graph.graph import HELD, Call, Graph, Read, Spec
from surgeon.graph.messages import source_line
from surgeon.graph.opaque_ops import HigherOrder, held_by_functions
from surgeon.graph.tensors import architecture, held_tensors, named, named_tensors, tensor_leaves

_CONST_LIMIT = 1 << 22  # integer values larger than this are not kept for index arithmetic


class _Value:
    """What one tensor object holds now: a graph node, and how to read it again if its base was written to."""

    __slots__ = ("base", "index", "node", "op", "rest", "seen", "source", "version")

    def __init__(
        self, node: fx.Node | None, base: _Value | None = None, op: Any = None, rest: Any = None
    ) -> None:
        self.node, self.base, self.op, self.rest = node, base, op, rest
        self.index: int | None = None
        self.source: fx.Node | None = (
            None  # the op with several outputs, of which this is one that nobody has read yet
        )
        self.version = 0  # bumped on the root by every write
        self.seen = 0  # the root's version that `node` shows

    def root(self) -> _Value:
        value = self
        while value.base is not None:
            value = value.base
        return value


class Recorder(PlainMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.stack = CallStack(model)
        self.hash = architecture(model)
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
        self.held = {id(tensor): tensor for tensor in held_tensors(model)}
        kept = (t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor))
        self.stored = frozenset(self.names[id(t)] for t in kept if id(t) in self.names)
        self.values: dict[int, tuple[weakref.ref[Tensor], _Value]] = {}
        self.kept: list[Tensor] = []  # inputs and lifted constants, alive as long as the recorder
        self.calls: list[Call] = []
        self.inputs: list[tuple[str, fx.Node]] = []
        self.saved: dict[str, Tensor] = {}
        self.last: fx.Node | None = None
        self.within = 0  # the number of the product that runs, 0 outside of them

    def watching(self) -> CallStack:
        return self.stack

    def place(self) -> str:
        module = self.stack.current
        last = f"after {self.last.target}" if self.last is not None else "before the first op"
        return f"module '{module}', {last}" if module else last

    def restore(self) -> None:
        """Put back what the model's own forward wrote into its tensors."""
        with torch.no_grad():
            for name, value in self.saved.items():
                self.tensors[name].copy_(value)

    # -- values ----------------------------------------------------------------------------------------------

    def _lookup(self, tensor: Tensor) -> _Value | None:
        entry = self.values.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _bind(self, tensor: Tensor, value: _Value) -> None:
        key = id(tensor)
        self.values[key] = (weakref.ref(tensor), value)

    def placeholder(self, path: str, tensor: Tensor) -> None:
        if self._lookup(tensor) is not None:
            return
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        node.meta.update(spec=_spec(tensor), module="", source=None)
        self.kept.append(tensor)
        self.inputs.append((path, node))
        self._bind(tensor, _Value(node))

    def _value(self, tensor: Tensor) -> _Value:
        value = self._lookup(tensor)
        if value is not None:
            return value
        name = self.names.get(id(tensor))
        if name is None:
            kind = HELD if id(tensor) in self.held else "_constant_"
            name = f"{kind}{len(self.tensors) - len(self.owned)}"
            self.tensors[name] = tensor.detach().clone()
            self.kept.append(tensor)
        node = self.graph.create_node("get_attr", name, name=f"tensor_{len(self.values)}")
        node.meta.update(spec=_spec(tensor), module="", source=None)
        if _is_index(tensor):
            node.meta["const"] = self.tensors[name].detach().clone()
        value = _Value(node)
        self._bind(tensor, value)
        return value

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """The node that holds a tensor now; None for tensors that the run has not met."""
        value = self._lookup(tensor)
        return None if value is None else self.node(value)

    def node(self, value: _Value) -> fx.Node:
        """The node that holds `value` now; views of a base that was written to are read again."""
        if value.node is None and value.source is not None and value.index is not None:
            value.node = self._item(value.source, value.index)
        if value.base is not None:
            version = value.root().version
            if value.seen != version:
                node = self._emit(
                    value.op, (self.node(value.base), *value.rest[0]), value.rest[1], value.rest[2]
                )
                if value.node is not None and "layout" in value.node.meta:
                    node.meta["layout"] = value.node.meta["layout"]
                value.node = node if value.index is None else self._item(node, value.index)
                value.seen = version
        assert value.node is not None
        return value.node

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        for user in node.users:
            if user.target is _views.getitem and user.args[1] == index:
                return user
        item = self.graph.create_node(
            "call_function", _views.getitem, (node, index), name=f"{node.name}_{index}"
        )
        specs = node.meta["spec"]
        item.meta.update(spec=specs[index], module=node.meta["module"], source=node.meta["source"])
        return item

    def _emit(self, op: Any, args: Any, kwargs: Any, spec: Any) -> fx.Node:
        node = self.graph.create_node(
            "call_function", op, args, kwargs, name=f"op_{len(self.calls)}"
        )  # no name is derived
        node.meta.update(spec=spec, module=self.stack.current, source=user_line())
        self.last = node
        return node

    def _nodes(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.node(self._value(item))
        if isinstance(item, list | tuple):
            return (
                type(item)(self._nodes(x) for x in item)
                if type(item) in (list, tuple)
                else tuple(map(self._nodes, item))
            )
        return item

    def product(self, number: int) -> None:
        """Which product runs from now on; 0: none."""
        self.within = number

    def assign(self, target: Tensor, source: Tensor) -> None:
        """`target.data = source`: it holds another value from now on, which loses entries with what it
        was.
        """
        old, node = self.node(self._value(target)), self.node(self._value(source))
        if target.shape == source.shape:
            node = self._emit(torch.ops.aten.copy.default, (old, node), {}, _spec(source))
        self._bind(target, _Value(node))

    # -- ops -------------------------------------------------------------------------------------------------

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.copy_.default and _views.overlap(*args[:2]):
            raise CaptureError(
                "a tensor is copied onto a part of itself that overlaps with it",
                where=f"{self.place()} {source_line(user_line())}".rstrip(),
                why="which entries are read before they are written over hangs on the machine, and so does the model's output",
                fix="copy what is read first: x[:, 1:] = x[:, :-1].clone()",
            )
        if _views.keeps_layout(func, args):  # only strides of dims of size 1 change
            return func(*args, **kwargs)
        written = _views.written(func, args, kwargs)
        for tensor in written:
            name = self.names.get(id(self._base_tensor(tensor)))
            if name is not None and name not in self.saved:
                self.saved[name] = self.tensors[name].detach().clone()
        graph_args, graph_kwargs = (
            self._nodes(args),
            {key: self._nodes(value) for key, value in kwargs.items()},
        )
        if isinstance(func, HigherOrder):
            graph_kwargs["held"] = self._nodes(held_by_functions(args))
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            node = self._turn(func, args, graph_args, graph_kwargs)
        elif written:
            node = self._write(func, args, graph_args, graph_kwargs, written, out)
        else:
            node = self._read(func, args, graph_args, graph_kwargs, out)
        if reads_a_value(func):
            note_value(self.node(self._value(args[0])), out, node.meta["source"])
        if decides(func, args, kwargs):
            node.meta["decision"] = decision(out)
        self.calls.append(Call(func, node, self.stack.current, node.meta["source"], self.within))
        return out

    def _base_tensor(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._is_view() else None
        return tensor if base is None else base

    def _read(self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any, out: Any) -> fx.Node:
        spec = _specs(out)
        node = self._emit(func, graph_args, graph_kwargs, spec)
        if func is torch.ops.aten.as_strided.default:  # says where in memory its entries lie
            node.meta["layout"] = args[0].stride(), args[0].storage_offset()
        view = _views.is_view(func) and args and isinstance(args[0], Tensor)
        base = self._value(args[0]) if view else None
        rest = (graph_args[1:], graph_kwargs, spec) if view else None
        if isinstance(out, Tensor):
            if self._lookup(out) is None or not view:
                value = _Value(node, base, func, rest)
                value.seen = value.root().version
                self._bind(out, value)
            if (
                _is_index(out)
                and all("const" in n.meta for n in node.all_input_nodes)
                and _deterministic(func)
            ):
                node.meta["const"] = out.detach().clone()
        elif isinstance(out, list | tuple):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    value = _Value(None, base, func, rest)
                    value.index, value.seen, value.source = index, value.root().version, node
                    self._bind(item, value)
        return node

    def _turn(self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any) -> fx.Node:
        """An op such as `transpose_` makes a tensor a view of what it was; no entry changes."""
        pure = _views.functional(func)
        if pure is None or not _views.is_view(pure):
            raise CaptureError(
                f"cannot record {func}, which changes the shape of a tensor in place",
                where=self.stack.current,
                why="it has no functional form that surgeon knows",
                fix="replace it in the model's forward by the op that returns a new tensor",
            )
        node = self._emit(pure, graph_args, graph_kwargs, _spec(args[0]))
        value = _Value(node, self._value(args[0]), pure, (graph_args[1:], graph_kwargs, _spec(args[0])))
        value.seen = value.root().version
        self._bind(args[0], value)
        return node

    def _write(
        self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any, written: list[Tensor], out: Any
    ) -> fx.Node:
        pure = (
            _views.functional(func) if written[0] is (args[0] if args else None) else _views.without_out(func)
        )
        if pure is None or len(written) != 1:
            return self._write_whole(func, graph_args, graph_kwargs, written, out)
        rest = {key: value for key, value in graph_kwargs.items() if key in _views.names(pure)}
        more = _views.left_out(func, pure, graph_args, graph_kwargs)
        node = self._emit(pure, graph_args, {**rest, **more}, _spec(written[0]))
        self._now_holds(written[0], node)
        if isinstance(out, Tensor) and self._lookup(out) is None:
            self._bind(out, self._value(written[0]))
        return node

    def _write_whole(
        self, func: Any, graph_args: Any, graph_kwargs: Any, written: list[Tensor], out: Any
    ) -> fx.Node:
        """An op without a functional form, as one op that gives its outputs and what it wrote."""
        outputs = list(out) if isinstance(out, list | tuple) else [] if out is None else [out]
        spec = tuple(_spec(item) if isinstance(item, Tensor) else None for item in (*outputs, *written))
        node = self._emit(_views.whole(func), graph_args, graph_kwargs, spec)
        for index, tensor in enumerate(written, len(outputs)):
            self._now_holds(tensor, self._item(node, index))
        for index, item in enumerate(outputs):
            if isinstance(item, Tensor) and self._lookup(item) is None:
                self._bind(item, _Value(self._item(node, index)))
        return node

    def _now_holds(self, tensor: Tensor, node: fx.Node) -> None:
        """A tensor was written to: it holds another value, and so does all that it is a view of."""
        value = self._value(tensor)
        value.node = node
        while value.base is not None:
            base = value.base
            old = self.node(base)
            base_spec = old.meta["spec"]
            inverse = _views.scatter(value.op, old, value.node, value.rest[0], value.index, base_spec)
            if inverse is None:
                raise CaptureError(
                    f"cannot record a write through the view {value.op}",
                    where=self.stack.current,
                    why="surgeon has no inverse of this view",
                    fix="write to the tensor itself, or to a slice of it",
                )
            base.node = self._emit(inverse[0], inverse[1], inverse[2], base_spec)
            value = base
        value.version += 1
        self._mark(self._value(tensor), value.version)

    def _mark(self, value: _Value | None, version: int) -> None:
        while value is not None:
            value.seen = version
            value = value.base

    # -- the end ---------------------------------------------------------------------------------------------

    def finish(
        self,
        output: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        assumed: str,
        names: Sequence[str] | None = None,
        reads: Sequence[Read] = (),
    ) -> Graph:
        leaves = list(tensor_leaves(output))
        if not leaves and not reads:
            raise CaptureError(
                f"the model's output holds no tensor (it is a {type(output).__name__})",
                fix="let forward return a tensor, or a dict, list, tuple or dataclass of tensors",
            )
        counted = named(leaves, names)
        outputs = tuple((path, self.node(self._value(tensor))) for path, tensor in counted)
        left = [read.node for read in reads if read.node is not None]
        self.graph.output((*(node for _, node in outputs), *left))
        return Graph(
            fx=self.graph,
            tensors=self.tensors,
            owned=self.owned,
            stored=self.stored,
            aliases=self.aliases,
            hash=self.hash,
            calls=tuple(self.calls),
            outputs=outputs,
            reads=tuple(reads),
            results=tuple(tensor.detach() for _, tensor in counted),
            inputs=tuple(self.inputs),
            args=args,
            kwargs=kwargs,
            assumed=assumed,
            named=tuple(names or ()),
            decisions=decisions_of(self.graph, self.owned),
        )


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype)


def _specs(out: Any) -> Any:
    if isinstance(out, Tensor):
        return _spec(out)
    if isinstance(out, list | tuple):
        return tuple(_spec(item) if isinstance(item, Tensor) else None for item in out)
    return None


def _is_index(tensor: Tensor) -> bool:
    return (
        not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.numel() <= _CONST_LIMIT
        and not tensor.is_meta
    )


def _deterministic(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded not in func.tags
