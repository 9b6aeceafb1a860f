"""rebuilt(model, runs) -> tensors that the model's own code makes anew while it runs: caches and tables that grow.

Such code computes a table from a width (sin of arange, a rotary table), perhaps only for longer inputs. Were the
table cut like a weight, the code would put the first entries of a narrower one in place of those that were kept.

What code may store is read from its bytecode, from `forward` on through the methods and functions that it names.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Sequence

from torch import nn

from surgeon.capture.paths.methods import ANY, facts, named_by, reachable
from surgeon.graph.graph import Graph
from surgeon.graph.module_tree import named_modules, named_registered
from surgeon.graph.tensors import named_tensors

Line = tuple[str, int]


def rebuilt(model: nn.Module, runs: Sequence[Graph]) -> dict[str, Line]:
    """name -> the line that stores it, of tensors that code which runs in `forward` may store.

    Tensors that no state dict holds count wherever they are stored. Of others (a running mean is stored anew as
    well) those count that are stored where the code decides by a value or a size, such as a longer input.
    """
    first, found = runs[0], dict[str, Line]()
    trained = {name for name, _ in named_registered(model, "_parameters")}
    if not (first.owned - trained):
        return found
    decided = {d.source for run in runs for d in run.decisions if d.source is not None and d.kind != "mode"}
    for prefix, module in named_modules(model):
        functions = reachable(module, ["forward"])
        hanging = [f for f in functions if _decides(f, decided)]
        hanging = [*hanging, *itertools.chain.from_iterable(named_by(f, module) for f in hanging)]
        storing = [f for f in functions if facts(f.__code__).stored]
        if not storing and not hanging:
            continue
        own = {
            name.removeprefix(f"{prefix}.") if prefix else name
            for name in first.owned
            if name.startswith(prefix)
        }
        for function, everything in (*((f, False) for f in storing), *((f, True) for f in hanging)):
            for name, line in facts(function.__code__).stored:
                for held in _meant(name, own, everything):
                    path = f"{prefix}.{held}" if prefix else held
                    if everything or path not in first.stored:
                        found.setdefault(path, (function.__code__.co_filename, line))
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    return {name: line for name, line in found.items() if name not in trained and name in names.values()}


def _meant(name: str, own: Iterable[str], everything: bool) -> list[str]:
    """The tensors of a module, or of modules below it, that a stored name may mean."""
    if name == ANY:
        return [held for held in own if "." not in held] if everything else []
    return [held for held in own if held.rpartition(".")[2] == name]


def _decides(function: types.FunctionType, decided: Iterable[Line]) -> bool:
    code = function.__code__
    lines = facts(code).lines
    return any(path == code.co_filename and line in lines for path, line in decided)
