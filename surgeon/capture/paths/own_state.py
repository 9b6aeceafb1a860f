"""OwnState: what modules hold that forward changes, and by which it decides: a later call may take another path.

A counter of steps, a flag that is set at the first call, a state that is kept for the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from surgeon.capture.paths.methods import reachable
from surgeon.capture.paths.source_tests import deciding
from surgeon.graph.graph import Decision
from surgeon.graph.tensors import OF_TORCH

_PLAIN = (bool, int, float, str, type(None))
_SIZED = (list, dict, set)
_ABSENT = object()


class OwnState:
    """Made before a run, asked after it.

    Tensors count if they hang on the inputs: a table that forward builds once is the same at each call.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._before = [
            (module, _own(module)) for module in modules if len(module.__dict__) > len(OF_TORCH) - 1
        ]

    def note(self, node_of: Callable[[Tensor], fx.Node | None]) -> list[Decision]:
        """Write down at kept tensors that code tests whether they are there; decisions by other things that changed."""
        found = []
        for decision in self._decisions(node_of):
            if decision.node is None:
                found.append(decision)
            else:
                decision.node.meta.setdefault("decisions", []).append(decision)
        return found

    def _decisions(self, node_of: Callable[[Tensor], fx.Node | None]) -> Iterator[Decision]:
        for module, before in self._before:
            after = _own(module)
            if after == before:
                continue
            for name in {**before, **after}:
                if _same(before.get(name, _ABSENT), after.get(name, _ABSENT)):
                    continue
                kept = getattr(module, name, None)
                node = node_of(kept) if isinstance(kept, Tensor) else None
                if isinstance(kept, Tensor) and (node is None or not _from_inputs(node)):
                    continue
                for line in _decided(module, name, name in before):
                    yield Decision("value", f"`{name}`, which forward changes,", "", line, node)


@functools.cache
def _has_own_code(kind: type[nn.Module]) -> bool:
    """Whether the class is none of torch's, of which none decides by what it has changed."""
    return not kind.__module__.startswith("torch.")


def _from_inputs(node: fx.Node) -> bool:
    seen, todo = {node}, [node]
    while todo:
        at = todo.pop()
        if at.op == "placeholder":
            return True
        new = [n for n in at.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


def _own(module: nn.Module) -> dict[str, Any]:
    """name -> what can be compared: plain values, lengths of containers, `Tensor` for any tensor."""
    found: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in OF_TORCH:
            continue
        if isinstance(value, Tensor):
            found[name] = Tensor
        elif isinstance(value, _PLAIN):
            found[name] = value
        elif type(value) in _SIZED:
            found[name] = (type(value), len(value))
    for name, held in module._buffers.items():
        found[name] = None if held is None else Tensor
    return found


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b or a != a))


def _decided(module: nn.Module, name: str, was_there: bool) -> Iterator[tuple[str, int]]:
    """Lines of code that forward may run which decide by an attribute; one that was not there is asked for by name."""
    for function in reachable(module, ["forward"]):
        code = function.__code__
        last = max((line for *_, line in code.co_lines() if line is not None), default=code.co_firstlineno)
        for line, attributes, texts in deciding(code.co_filename):
            if code.co_firstlineno <= line <= last and name in (attributes if was_there else texts):
                yield code.co_filename, line
