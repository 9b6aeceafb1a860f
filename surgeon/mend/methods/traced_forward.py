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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from surgeon.graph.source_code import TRACED
from surgeon.mend.methods.tracing import Mode, OneModule, called_functions, is_foreign

Versions = Mapping[Mode, fx.GraphModule]


def versions(module: nn.Module, buffers: bool = False) -> Versions:
    """The forward for both modes, or for each; for training it is missing where it cannot be traced.

    Args:
        buffers: read buffers when it runs, instead of keeping what was computed of them alone.

    Raises:
        Exception: whatever torch.fx raises if the forward cannot be traced symbolically.
    """
    with contextlib.suppress(Exception):  # it decides by the mode; whatever else is wrong is raised below
        return {None: _traced(module, buffers, None)}
    found: dict[Mode, fx.GraphModule] = {False: _traced(module, buffers, False)}
    with contextlib.suppress(Exception):  # that of training may be missing: see above
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
    functions = called_functions(module)
    ways = [
        (wrapped, factories)
        for wrapped in ([(), functions] if functions else [()])
        for factories in (True, False)
    ]
    for attempt, (wrapped, calls_factories) in enumerate(ways, 1):
        shallow.__dict__.clear()
        shallow.__dict__.update(own)
        try:
            graph = OneModule(buffers, training, calls_factories, wrapped).trace(shallow)
            break
        except Exception:  # the code looks into such a tensor, or decides by what a function is handed
            if attempt == len(ways):
                raise
    shallow.__dict__["training"] = module.training
    return fx.GraphModule(shallow, graph, type(module).__name__)


def foreign(traced: fx.GraphModule) -> set[str]:
    """Names of the functions that the forward calls and that are neither torch's nor Python's own."""
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    return {str(f.__name__) for f in called if is_foreign(f)}


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
