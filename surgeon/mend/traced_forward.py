"""A module's own forward as torch.fx graphs with its children untouched: to look for numbers in it, and to
run it changed.

Code may decide by `self.training`. If it only hands it on (to a dropout, say), one graph does for both modes;
else there is one for each, and `methods_of` joins them again.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import linecache
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from surgeon.graph.source_code import TRACED

Mode = bool | None  # of training; None: both
Versions = Mapping[Mode, fx.GraphModule]

_FACTORIES = "arange empty eye full linspace logspace ones rand randint randn randperm tensor tril_indices triu_indices zeros"


def versions(module: nn.Module, buffers: bool = False) -> Versions:
    """The forward for both modes, or for each; for training it is missing where it cannot be traced.

    Args:
        buffers: read buffers when it runs, instead of keeping what was computed of them alone.

    Raises:
        Exception: whatever torch.fx raises if the forward cannot be traced symbolically.
    """
    with contextlib.suppress(
        Exception
    ):  # it decides by the mode (or anything else is wrong: it is raised below)
        return {None: _traced(module, buffers, None)}
    found: dict[Mode, fx.GraphModule] = {False: _traced(module, buffers, False)}
    with contextlib.suppress(Exception):
        found[True] = _traced(module, buffers, True, constants(found[False]))  # a name is one tensor in both
    return found


def trace_one(module: nn.Module, buffers: bool = False) -> fx.GraphModule:
    """The forward, that of eval mode if they differ; see `versions`."""
    return next(iter(versions(module, buffers).values()))


def constants(traced: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors that the forward reads from elsewhere than its module, by the names that torch.fx gave them."""
    return {
        name: tensor
        for name, tensor in traced.named_buffers(recurse=False)
        if name.startswith("_tensor_constant")
    }


def _traced(
    module: nn.Module, buffers: bool, training: Mode, known: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    own = {**module.__dict__, **(known or {})}
    shallow = type(module).__new__(type(module))  # what forward keeps on its module lands here
    functions = _called(module)
    ways = [
        (wrapped, factories)
        for wrapped in ([(), functions] if functions else [()])
        for factories in (True, False)
    ]
    for attempt, (wrapped, calls_factories) in enumerate(ways, 1):
        shallow.__dict__.clear()
        shallow.__dict__.update(own)
        try:
            graph = _OneModule(buffers, training, calls_factories, wrapped).trace(shallow)
            break
        # the code looks into such a tensor, or decides by what a function is handed: the next way is tried
        except Exception:
            if attempt == len(ways):
                raise
    shallow.__dict__["training"] = module.training
    return fx.GraphModule(shallow, graph, type(module).__name__)


def _called(module: nn.Module) -> tuple[tuple[dict[str, Any], str], ...]:
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
    return tuple((space, name) for space in spaces.values() for name in names if _is_foreign(space.get(name)))


def _is_foreign(found: Any) -> bool:
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


class _OneModule(fx.Tracer):
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


def foreign(traced: fx.GraphModule) -> set[str]:
    """Names of the functions that the forward calls and that are neither torch's nor Python's own."""
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    return {str(f.__name__) for f in called if _is_foreign(f)}


# -- what is in it -------------------------------------------------------------------------------------------


def literals(traced: fx.GraphModule) -> list[tuple[str, int]]:
    """Every whole number in the arguments of the calls of a traced forward: (name of the place, number)."""
    found: list[tuple[str, int]] = []
    for name, occurrence, node in calls(traced):
        for place, value in _numbers((node.args, node.kwargs), ""):
            found.append((f"{name}:{occurrence}:{place}", value))
    return found


def calls(traced: fx.GraphModule) -> Iterable[tuple[str, int, fx.Node]]:
    """(function, occurrence, node) of every call of a function or method in a traced forward."""
    seen: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = (
                node.target
                if isinstance(node.target, str)
                else getattr(node.target, "__name__", str(node.target))
            )
            occurrence = seen[name] = seen.get(name, -1) + 1
            yield name, occurrence, node


def _numbers(item: Any, path: str) -> Iterable[tuple[str, int]]:
    if isinstance(item, bool):
        return
    if isinstance(item, int):
        yield path.lstrip("."), item
    elif isinstance(item, slice):
        yield from _numbers((item.start, item.stop, item.step), path)
    elif isinstance(item, list | tuple):
        for i, x in enumerate(item):
            yield from _numbers(x, f"{path}.{i}")
    elif isinstance(item, dict):
        for key, x in item.items():
            yield from _numbers(x, f"{path}.{key}")


def counterpart(node: fx.Node, traced: fx.GraphModule, other: fx.GraphModule) -> fx.Node | None:
    """The same call in the forward for another mode: at its place in the longest run of equal calls; None if
    it has none.
    """
    ours, theirs = list(traced.graph.nodes), list(other.graph.nodes)
    place = ours.index(node)
    matcher = difflib.SequenceMatcher(
        None, [_said(n) for n in ours], [_said(n) for n in theirs], autojunk=False
    )
    for block in matcher.get_matching_blocks():
        if block.a <= place < block.a + block.size:
            found: fx.Node = theirs[block.b + place - block.a]
            return found
    return None


def _said(node: fx.Node) -> str:
    constants = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda item: None if isinstance(item, fx.Node) else item
    )
    return f"{node.op} {node.target} {constants}"


# -- run it --------------------------------------------------------------------------------------------------


def methods_of(found: Versions) -> dict[str, Callable[..., Any]]:
    """A `forward` that runs the version of the module's mode, and what it calls; all can be scripted, and
    their source read.

    Raises:
        ValueError: the versions give one name to two things.
    """
    if None in found:
        return {"forward": type(found[None]).forward}
    names: dict[str, Any] = {}
    parts: dict[Mode, ast.FunctionDef] = {}
    for mode, traced in found.items():
        code = traced.graph.python_code("self")
        for name, value in code.globals.items():
            if names.setdefault(name, value) is not value and names[name] != value:
                raise ValueError(f"{name} is one thing in training mode and another in eval mode")
        parts[mode] = next(part for part in ast.parse(code.src).body if isinstance(part, ast.FunctionDef))
        parts[mode].name = "_forward_training" if mode else "_forward_eval"
    takes, gives = parts[False].args, parts[False].returns
    passed = [arg.arg for arg in takes.args[1:]]
    passed += [star + arg.arg for star, arg in (("*", takes.vararg), ("**", takes.kwarg)) if arg is not None]
    train = (
        f"return self._forward_training({', '.join(passed)})"
        if True in parts
        else f"raise RuntimeError({_NO_TRAINING!r})"
    )
    source = f"""def forward({ast.unparse(takes)}){f" -> {ast.unparse(gives)}" if gives else ""}:
    if self.training:
        {train}
    return self._forward_eval({", ".join(passed)})
"""
    source = "\n\n".join([*map(ast.unparse, parts.values()), source])
    file = f"{TRACED[0]}{next(_files)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)  # torch.fx's own code of the module's forward, as it makes it
    return {name: names[name] for name in ("forward", *(part.name for part in parts.values()))}


_files = itertools.count()
_NO_TRAINING = (
    "a number in this module's forward changed with its widths, and torch.fx could not trace the forward in training mode: "
    "compute the number from the tensor's shape in forward and cut again, or call eval()"
)
