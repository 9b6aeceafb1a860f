"""Tracing of a single module's forward by torch.fx: its children stay calls."""

from __future__ import annotations

import contextlib
import itertools
import operator
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import fx, nn
from torch.overrides import TorchFunctionMode

Mode = bool | None  # of training; None: both

_FACTORIES = "arange empty eye full linspace logspace ones rand randint randn randperm tensor tril_indices triu_indices zeros"


def called_functions(module: nn.Module) -> tuple[tuple[dict[str, Any], str], ...]:
    """Where the module's code finds functions of Python's: (namespace, name); those of modules that are no
    part of torch, too.
    """
    kinds = [kind for kind in type(module).__mro__ if kind not in nn.Module.__mro__]
    methods = [f for kind in kinds for f in vars(kind).values() if isinstance(f, types.FunctionType)]
    names = sorted({name for f in methods for name in f.__code__.co_names})
    spaces = {id(f.__globals__): f.__globals__ for f in methods}
    for name, space in itertools.product(names, tuple(spaces.values())):
        held = space.get(name)
        if isinstance(held, types.ModuleType) and not _of_torch(held.__name__):
            spaces[id(vars(held))] = vars(held)
    return tuple((space, name) for space in spaces.values() for name in names if is_foreign(space.get(name)))


def is_foreign(found: Any) -> bool:
    return isinstance(found, types.FunctionType) and not _of_torch(found.__module__ or "")


def _of_torch(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "builtins", "math", "_operator")


class _Value(fx.Proxy):
    """A value of a forward that is written into as the code says: x[:, :4] = y, x += y."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(function: Callable[..., Any]) -> Callable[[_Value, Any], fx.Proxy]:
    def write(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return write


for _name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split():
    setattr(_Value, f"__{_name}__", _in_place(getattr(operator, _name)))


class OneModule(fx.Tracer):
    """Traces a single module: its children stay calls, its buffers are read or (as literals have been
    counted) computed with.

    Args:
        training: the mode; None: it is read when the graph runs, and what decides by it cannot be traced.
        calls_factories: tensors that the forward makes are made when it runs, on the device that it runs on;
            else they are kept.
        wrapped: where functions are that are not looked into, as (namespace, name).
    """

    def __init__(
        self,
        buffers: bool,
        training: Mode,
        calls_factories: bool,
        wrapped: Sequence[tuple[dict[str, Any], str]] = (),
    ) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.proxy_buffer_attributes, self.training, self.calls_factories = buffers, training, calls_factories

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        made = super().create_args_for_root(root_fn, is_module, concrete_args)
        mode = self.create_proxy("get_attr", "training", (), {}) if self.training is None else self.training
        self.root.__dict__["training"] = mode
        return made

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with _Factories(self) if self.calls_factories else contextlib.nullcontext(), self._calling():
            graph = super().trace(root, concrete_args)
        for node in graph.find_nodes(op="get_attr", target="training"):
            if not node.users:
                graph.erase_node(node)
        for node in graph.nodes:
            if isinstance(
                node.type, str
            ):  # of a file with postponed annotations; TorchScript wants the class
                node.type = _hints(type(root)).get("return" if node.op == "output" else node.target)
        return graph

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Put calls of the wrapped functions, and of those that make tensors, on traced values into the
        graph.
        """
        factories = [
            (vars(torch), name) for name in _FACTORIES.split()
        ]  # their own parser refuses sizes that are traced
        before = [(space, name, space[name]) for space, name in (*self.wrapped, *factories)]

        def put(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                leaves = torch.utils._pytree.tree_leaves((args, kwargs))
                if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
                    return self.create_proxy("call_function", function, args, kwargs)
                return function(*args, **kwargs)

            return called

        try:
            for space, name, function in before:
                space[name] = put(function)
            yield
        finally:
            for space, name, function in before:
                space[name] = function


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind.forward)  # type: ignore[attr-defined]  # of a module
    except Exception:  # noqa: BLE001  # names that only type checkers import; no annotation is needed to run
        return {}


class _Factories(TorchFunctionMode):
    """Puts calls that make a tensor of numbers alone into the graph."""

    functions = frozenset(getattr(torch, name) for name in _FACTORIES.split())

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
