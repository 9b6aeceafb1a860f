"""repeats(model, run): whether a model runs op by op as in a recorded run, in training mode or told other answers.

Most code that asks for a mode then does the same, or what dropout and stochastic depth do, which is left out. To see
that takes a light run, without a record.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.hollow.mode import NeedsValuesError, hollow
from surgeon.capture.meta_run import PlainMode
from surgeon.capture.model_state import copies, quiet_run
from surgeon.graph.graph import Graph, spec
from surgeon.graph.module_tree import parameters_of
from surgeon.graph.opaque_ops import HigherOrder
from surgeon.graph.tensors import named, named_tensors, tensor_leaves
from surgeon.ops.table import Trait, has, op_name

_STATISTICS = 5  # arguments of a batch norm that are tensors; modes and momentum come after them


class _OtherwiseError(Exception):
    """The run does something else. The model's code may catch it: the mode remembers."""


class _Repeated(PlainMode):
    """Holds each op against the next one of a record: the same op, on the same values, with the same numbers."""

    def __init__(self, model: nn.Module, run: Graph) -> None:
        super().__init__()
        self.calls = [call for call in run.calls if _computes(call.node)]
        self.at, self.other = 0, False
        self.names: dict[int, str] = {}
        for name, tensor in named_tensors(model):
            self.names.setdefault(id(tensor), name)
        self.constants = run.tensors
        self.owned = run.owned
        self.known: dict[int, tuple[weakref.ref[Tensor], fx.Node, int | None]] = {}

    def know(self, tensor: Tensor, node: fx.Node, index: int | None = None) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), node, index

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        floats = [t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point() or t.is_complex()]
        if isinstance(func, HigherOrder):
            self.stop()
        if not floats:
            out = self.run(func, args, kwargs)
            made = [t for t in _tensors((out,)) if t.is_floating_point() or t.is_complex()]
            if made and not self._is_next(func, args, kwargs):
                self.stop()
            elif made:
                self._went(out)
            return out
        if not self._is_next(func, args, kwargs):
            self.stop()
        out = self.run(func, args, kwargs)
        self._went(out)
        return out

    def stop(self) -> None:
        self.other = True
        raise _OtherwiseError

    def _went(self, out: Any) -> None:
        node = self.calls[self.at].node
        self.at += 1
        if isinstance(out, Tensor):
            self.know(out, node)
        elif isinstance(out, list | tuple):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self.know(item, node, index)

    def _is_next(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if self.at == len(self.calls) or self.calls[self.at].op is not func:
            return False
        node = self.calls[self.at].node
        count = _STATISTICS if has(op_name(node), Trait.BATCH_NORM) else None
        given, recorded = (
            (args[:count], {} if count else kwargs),
            (node.args[:count], {} if count else node.kwargs),
        )
        return self._same(given, recorded)

    def _same(self, given: Any, recorded: Any) -> bool:
        if isinstance(given, Tensor):
            return isinstance(recorded, fx.Node) and self._holds(given, recorded)
        if isinstance(given, list | tuple):
            return (
                isinstance(recorded, list | tuple)
                and len(given) == len(recorded)
                and all(map(self._same, given, recorded))
            )
        if isinstance(given, dict):
            return (
                isinstance(recorded, dict)
                and given.keys() == recorded.keys()
                and all(self._same(value, recorded[key]) for key, value in given.items())
            )
        return given is recorded or repr(given) == repr(recorded)

    def _holds(self, tensor: Tensor, node: fx.Node) -> bool:
        """Whether a tensor is the one that a node of the record stands for."""
        ref, known, index = self.known.get(id(tensor), (None, None, None))
        if ref is not None and ref() is tensor:
            if index is None:
                return known is node
            return node.op == "call_function" and node.args == (known, index)
        name = self.names.get(id(tensor))
        if node.op != "get_attr":
            return not (
                tensor.is_floating_point() or tensor.is_complex()
            )  # counts and positions are not followed
        if name is not None:
            return node.target == name
        held = self.constants[str(node.target)]
        return node.target not in self.owned and held.shape == tensor.shape and torch.equal(held, tensor)


def _computes(node: fx.Node) -> bool:
    """Whether an op reads or makes numbers that are no counts."""
    for held in (*node.all_input_nodes, node):
        found = spec(held)
        if found is not None and (found.dtype.is_floating_point or found.dtype.is_complex):
            return True
    return False


def _tensors(items: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif type(item) in (list, tuple):
            found += _tensors(item)
    return found


def repeats(
    model: nn.Module, run: Graph, *, training: bool = False, answers: Mapping[str, bool] | None = None
) -> bool:
    """Whether a run in that mode does the same; some false noes, among them all runs that read numbers.

    Args:
        run: a recorded run, with the inputs.
        training, answers: see `capture`.
    """
    if run.reads or any(parameter.is_meta for parameter in parameters_of(model)):
        return False
    mode = _Repeated(model, run)
    with quiet_run(model, 0, training, answers, above=mode):
        try:
            args, kwargs = copies((run.args, run.kwargs))
            leaves = [tensor for _, tensor in tensor_leaves((args, kwargs))]
            for (_, node), tensor in zip(run.inputs, _once(leaves), strict=True):
                mode.know(tensor, node)
            for path in run.scaling:
                model.get_submodule(path).__dict__["training"] = False
            if hollow(mode, model, leaves) is None:
                return False
            with mode:
                output = model(*args, **kwargs)
            return not mode.other and mode.at == len(mode.calls) and _gives(mode, output, run)
        except (NeedsValuesError, Exception):  # noqa: BLE001  # whatever the model's code raises: it is not the same run
            return False


def _once(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _gives(mode: _Repeated, output: Any, run: Graph) -> bool:
    leaves = named(list(tensor_leaves(output)), run.named or None)
    return len(leaves) == len(run.outputs) and all(
        mode._holds(tensor, node) for (_, tensor), (_, node) in zip(leaves, run.outputs, strict=True)
    )
