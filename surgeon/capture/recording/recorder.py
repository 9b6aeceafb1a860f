"""Recorder: a dispatch mode that writes the ATen ops of a running model into a pure graph.

An in-place op is recorded as its functional form, whose result its target holds from then on (see `values`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.call_stack import CallStack, user_line
from surgeon.capture.meta_run import PlainMode
from surgeon.capture.paths.decisions import decisions_of, note_value, reads_a_value
from surgeon.capture.recording import aliasing
from surgeon.capture.recording.values import Value, Values, is_index, spec_of, specs_of
from surgeon.capture.value_dependent import decides, decision
from surgeon.errors import CaptureError
from surgeon.graph.graph import Call, Graph, Read
from surgeon.graph.messages import source_line
from surgeon.graph.opaque_ops import HigherOrder, held_by_functions
from surgeon.graph.tensors import architecture, named, tensor_leaves


class Recorder(PlainMode):
    with_functions = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack = CallStack(model)
        self.values = Values(model, self.stack)
        self.hash = architecture(model)
        self.calls: list[Call] = []
        self.within = 0  # the number of the product that runs, 0 outside of them

    def watching(self) -> CallStack:
        return self.stack

    def place(self) -> str:
        module = self.stack.current
        last = f"after {self.values.last.target}" if self.values.last is not None else "before the first op"
        return f"module '{module}', {last}" if module else last

    def product(self, number: int) -> None:
        """Which product runs from now on; 0: none."""
        self.within = number

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.copy_.default and aliasing.overlap(*args[:2]):
            raise CaptureError(
                "a tensor is copied onto a part of itself that overlaps with it",
                where=f"{self.place()} {source_line(user_line())}".rstrip(),
                why="which entries are read before they are written over hangs on the machine, and so does the model's output",
                fix="copy what is read first: x[:, 1:] = x[:, :-1].clone()",
            )
        if aliasing.keeps_layout(func, args):  # only strides of dims of size 1 change
            return self.run(func, args, kwargs)
        written = aliasing.written(func, args, kwargs)
        self.values.made = args[0] if func is torch.ops.aten.lift_fresh.default else None
        graph_args, graph_kwargs = (
            self.values.nodes(args),
            {key: self.values.nodes(value) for key, value in kwargs.items()},
        )
        if isinstance(func, HigherOrder):
            graph_kwargs["held"] = self.values.nodes(held_by_functions(args))
        out = self.run(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            node = self._turn(func, args, graph_args, graph_kwargs)
        elif written:
            node = self._write(func, args, graph_args, graph_kwargs, written, out)
        else:
            node = self._read(func, args, graph_args, graph_kwargs, out)
        if reads_a_value(func) and args and isinstance(args[0], Tensor):
            note_value(self.values.node(self.values.of(args[0])), out, node.meta["source"])
        if decides(func, args, kwargs):
            node.meta["decision"] = decision(out)
        self.calls.append(Call(func, node, self.stack.current, node.meta["source"], self.within))
        return out

    def _read(self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any, out: Any) -> fx.Node:
        spec = specs_of(out)
        node = self.values.emit(func, graph_args, graph_kwargs, spec)
        if func is torch.ops.aten.as_strided.default:  # says where in memory its entries lie
            node.meta["layout"] = args[0].stride(), args[0].storage_offset()
        view = aliasing.is_view(func) and args and isinstance(args[0], Tensor)
        base = self.values.of(args[0]) if view else None
        rest = (graph_args[1:], graph_kwargs, spec) if view else None
        if isinstance(out, Tensor):
            if self.values.lookup(out) is None or not view:
                value = Value(node, base, func, rest)
                value.seen = value.root().version
                self.values.bind(out, value)
            if (
                is_index(out)
                and all("const" in n.meta for n in node.all_input_nodes)
                and _deterministic(func)
            ):
                node.meta["const"] = out.detach().clone()
        elif isinstance(out, list | tuple):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    value = Value(None, base, func, rest)
                    value.index, value.seen, value.source = index, value.root().version, node
                    self.values.bind(item, value)
        return node

    def _turn(self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any) -> fx.Node:
        """An op such as `transpose_` makes a tensor a view of what it was; no entry changes."""
        pure = aliasing.functional(func)
        if pure is None or not aliasing.is_view(pure):
            raise CaptureError(
                f"cannot record {func}, which changes the shape of a tensor in place",
                where=self.stack.current,
                why="it has no functional form that surgeon knows",
                fix="replace it in the model's forward by the op that returns a new tensor",
            )
        node = self.values.emit(pure, graph_args, graph_kwargs, spec_of(args[0]))
        value = Value(node, self.values.of(args[0]), pure, (graph_args[1:], graph_kwargs, spec_of(args[0])))
        value.seen = value.root().version
        self.values.bind(args[0], value)
        return node

    def _write(
        self, func: Any, args: Any, graph_args: Any, graph_kwargs: Any, written: list[Tensor], out: Any
    ) -> fx.Node:
        pure = (
            aliasing.functional(func)
            if written[0] is (args[0] if args else None)
            else aliasing.without_out(func)
        )
        if pure is None or len(written) != 1:
            return self._write_whole(func, graph_args, graph_kwargs, written, out)
        rest = {key: value for key, value in graph_kwargs.items() if key in aliasing.names(pure)}
        more = aliasing.left_out(func, pure, graph_args, graph_kwargs)
        node = self.values.emit(pure, graph_args, {**rest, **more}, spec_of(written[0]))
        self.values.write(written[0], node)
        if isinstance(out, Tensor) and self.values.lookup(out) is None:
            self.values.bind(out, self.values.of(written[0]))
        return node

    def _write_whole(
        self, func: Any, graph_args: Any, graph_kwargs: Any, written: list[Tensor], out: Any
    ) -> fx.Node:
        """An op without a functional form, as one op that gives its outputs and what it wrote."""
        outputs = list(out) if isinstance(out, list | tuple) else [] if out is None else [out]
        spec = tuple(spec_of(item) if isinstance(item, Tensor) else None for item in (*outputs, *written))
        node = self.values.emit(aliasing.whole(func), graph_args, graph_kwargs, spec)
        for index, tensor in enumerate(written, len(outputs)):
            self.values.write(tensor, self.values.item(node, index))
        for index, item in enumerate(outputs):
            if isinstance(item, Tensor) and self.values.lookup(item) is None:
                self.values.bind(item, Value(self.values.item(node, index)))
        return node

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
        outputs = tuple((path, self.values.node(self.values.of(tensor))) for path, tensor in counted)
        left = [read.node for read in reads if read.node is not None]
        self.values.graph.output((*(node for _, node in outputs), *left))
        return Graph(
            fx=self.values.graph,
            tensors=self.values.tensors,
            owned=self.values.owned,
            stored=self.values.stored,
            aliases=self.values.aliases,
            hash=self.hash,
            calls=tuple(self.calls),
            outputs=outputs,
            reads=tuple(reads),
            results=tuple(tensor.detach() for _, tensor in counted),
            inputs=tuple(self.values.inputs),
            args=args,
            kwargs=kwargs,
            assumed=assumed,
            named=tuple(names or ()),
            decisions=decisions_of(self.values.graph, self.values.owned),
        )


def _deterministic(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded not in func.tags
