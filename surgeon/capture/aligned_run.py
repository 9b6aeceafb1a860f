"""Beside: a mode that holds one run of a model against the recorded one, op by op; which ops count, and which
are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.call_stack import CallStack
from surgeon.capture.meta_run import PlainMode
from surgeon.graph.graph import Call, Graph, spec
from surgeon.graph.messages import source_line
from surgeon.ops import table
from surgeon.ops.table import Trait, has, op_name, target_name


class AlignedRun(PlainMode):
    """Follows a run through the recorded ops that every like run repeats; `at` is the one that comes next."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__()
        self.calls = repeated(graph)
        self.stack = CallStack(model)
        self.at = 0

    def op(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """The result of an op that counts; `out` is it already if the op reads no tensor, else None."""
        raise NotImplementedError

    def place(self) -> str:
        """Where the run is, for messages."""
        if self.at >= len(self.calls):
            return f"module '{self.stack.current}', after the last recorded op"
        call = self.calls[self.at]
        return f"module '{self.stack.current}', op {self.at}: {op_name(call.node)} {source_line(call.source)}".rstrip()

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if _only_copies(func):
            return self.run(func, args, kwargs)
        given = _tensors(args)
        out = None
        if not _any_counts(given):
            out = self.run(func, args, kwargs)
            if given or not isinstance(out, Tensor) or not _counts(out.dtype):
                return out
        return self.op(func, args, kwargs, out)


@functools.cache
def _only_copies(func: Any) -> bool:
    """Whether an op computes nothing and may be missing from a run that is like another one."""
    name = func._schema.name.removeprefix("aten::")
    return has(name, Trait.COPIES) or name == "as_strided_"


def _tensors(args: Any) -> list[Tensor]:
    """The tensors among an op's arguments, those in lists as well."""
    found: list[Tensor] = []
    for item in args:
        if isinstance(item, Tensor):
            found.append(item)
        elif type(item) in (list, tuple):
            found += _tensors(item)
    return found


def repeated(graph: Graph) -> list[Call]:
    """The recorded ops that every run on like inputs repeats."""
    return [c for c in graph.calls if not has(op_name(c.node), Trait.COPIES) and not of_whole_numbers(c.node)]


def same(call: Call, op: Any) -> bool:
    """Whether an op is the recorded one, up to how a tensor lies in memory."""
    return call.op is op or alike(call.op) == alike(op)


def alike(op: Any) -> str:
    """One name for ops that differ only by how a tensor lies in memory."""
    return table.alike(target_name(op))


def of_whole_numbers(node: fx.Node) -> bool:
    """Whether an op works on whole numbers: it has no size to mend, and code may remember its result and not
    run it again.
    """
    for source in node.all_input_nodes or (node,):
        held = spec(source)
        if held is not None and _counts(held.dtype):
            return False
    return True


def _any_counts(tensors: list[Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110  # one call for all
        if tensor.is_floating_point() or tensor.is_complex():
            return True
    return False


def _counts(dtype: torch.dtype) -> bool:
    """Whether numbers of this type are what a model computes, not whole numbers that count or point."""
    return dtype.is_floating_point or dtype.is_complex
