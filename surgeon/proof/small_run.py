"""run_small(small, graph, args, kwargs): the small model's own run in float64, op by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.meta_run import PlainMode
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.capture.recording.aliasing import written
from surgeon.capture.sizes.tracing import Sizes, looking_inside_functional
from surgeon.capture.value_dependent import DRAWN, RecordedReads, decides, draws, replay
from surgeon.errors import ProofError
from surgeon.graph.arguments import Arguments
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.graph import Graph, spec
from surgeon.graph.tensors import named, named_tensors, tensor_leaves
from surgeon.ops.masked_op import by_default_float64, is_narrow, leak, wide, widened
from surgeon.ops.table import Family, Trait, family, has
from surgeon.proof.line_up import Step, of_indices, optional, traced
from surgeon.proof.reference import ROUNDED, said

_KEEP = 1 << 27  # entries of the small model's inner results that are kept for comparison (1 GiB)


class DoesNotRunError(ProofError):
    """The small model stopped with an error."""


class _Upgrade(PlainMode):
    """Runs code that asks for float32 by name in float64, and notes the constants of every op."""

    def __init__(self, graph: Graph, leaking: bool) -> None:
        super().__init__()
        self.leaking = leaking
        self.trace: list[Step] = []
        self.room = _KEEP
        self.within = 0
        self.at = 0  # the recorded op that comes next
        self.ends = {call.within: place + 1 for place, call in enumerate(traced(graph))}
        self.lifted = _lifted(graph)
        self.exact: dict[fx.Node, Tensor] = {}
        self.decisions = [call.node for call in graph.calls if "decision" in call.node.meta][::-1]

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        args, kwargs = widened(args), {k: widened(v) for k, v in kwargs.items()}
        args = _all_wide(args, written(func, args, kwargs))
        for place, node in self.lifted.get(self.at, ()):
            if place < len(args) and isinstance(args[place], Tensor):
                self.exact[node] = args[place].clone()
        added = (
            leak(args[0])
            if self.leaking and has(name, Trait.SATURATES) and args[0].is_floating_point()
            else None
        )
        result = self._decided(func, args, kwargs)
        if result is None:
            result = by_default_float64(func)(*args, **kwargs)
        if added is not None:
            result.add_(added)
        if draws(name):
            result.fill_(DRAWN)
        if name == "lift_fresh":  # a tensor that the code makes of numbers, by name in float32
            result = wide(result)
        if not optional(name) and not of_indices([t.dtype for t in _leaves(args)]):
            self.trace.append(
                Step(name.rstrip("_"), _constants(func, args, kwargs), self._kept(name, result), self.within)
            )
            self.at += 1
        return result

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        """A product, of which torch may make other ops than it did in the recorded run."""
        self.within = number
        try:
            return run()
        finally:
            self.within = 0
            self.at = self.ends.get(number, self.at)

    def _decided(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The original's decision, so that both take one path; decisions come in the same order in both
        runs.
        """
        if not decides(func, args, kwargs) or not self.decisions or self.decisions[-1].target is not func:
            return None
        return replay(self.decisions.pop(), args, kwargs)

    def _kept(self, name: str, result: Any) -> Tensor | None:
        first = result[0] if isinstance(result, list | tuple) and result else result
        if (
            family(name) is not Family.CONTRACTION
            or not isinstance(first, Tensor)
            or first.numel() > self.room
        ):
            return None
        self.room -= first.numel()
        return first.clone()


class _Products(Sizes):
    """Tells of the products that run, makes tensors of Python's numbers in float64, and tells the code the dtype that
    it knows, as it may decide by it.
    """

    def __init__(self, told: Callable[[int, Callable[[], Any]], Any], graph: Graph) -> None:
        super().__init__()
        self.told, self.dtype = told, _dtype(graph)
        self.recorded = RecordedReads(graph.reads)
        self.left: list[Tensor] = []  # values that leave torch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if (
            func in _OF_NUMBERS
            and is_narrow(result)
            and not (kwargs or {}).get("dtype")
            and _has_no_dtype(args)
        ):
            return func(*args, **{**(kwargs or {}), "dtype": widened(result.dtype)})
        return self.dtype if result is torch.float64 else result

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        return size

    def read(self, how: str, tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """The code gets what the original got, in its type: what it makes of that is then the same."""
        with _disable_current_modes():
            self.left.append(tensor.detach().clone())
        return function(self.recorded.value(tensor))

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        return self.told(number, run)


_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)


def _has_no_dtype(args: Any) -> bool:
    """Whether a tensor is made of Python's own numbers, whose dtype is torch's default."""
    return not any(hasattr(item, "dtype") for item in torch.utils._pytree.tree_leaves(args))


def _dtype(graph: Graph) -> torch.dtype:
    """The floating type that the recorded run computed in."""
    nodes = (*(node for _, node in graph.inputs), *graph.fx.find_nodes(op="get_attr"))
    return next((spec(node).dtype for node in nodes if spec(node).dtype.is_floating_point), torch.float64)


def _all_wide(args: Any, targets: list[Tensor]) -> Any:
    """Arguments of an op in float64: code gets others from outside of torch (NumPy, objects). What is written stays."""
    kept = {id(tensor) for tensor in targets}
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t if id(t) in kept else wide(t), args)


def _leaves(args: Any) -> list[Tensor]:
    return [item for item in torch.utils._pytree.tree_leaves(args) if isinstance(item, Tensor)]


def _constants(func: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """The numbers among an op's arguments by name, those in tensors without dims too."""
    numbers: dict[str, float] = {}
    for name, item in Arguments(func, args, kwargs).items():
        single = isinstance(item, Tensor) and item.dim() == 0 and not item.is_complex()
        if single or (isinstance(item, int | float) and not isinstance(item, bool)):
            numbers[name] = float(item.detach() if isinstance(item, Tensor) else item)
    return numbers


Trace = tuple[list[tuple[str, Tensor]], list["Step"], dict[fx.Node, Tensor]]


def run_small(
    small: nn.Module,
    graph: Graph,
    args: Any,
    kwargs: Any,
    leaking: bool = False,
    filled: Mapping[str, Tensor] | None = None,
) -> Trace:
    """The small model's outputs, its steps, and numbers of its code that are not rounded.

    Args:
        leaking: something is added to what saturating activations give (see `leak`).
        filled: numbers to take in place of those of some tensors.
    """
    with torch.no_grad():
        twin = copied(small)._apply(wide)
    for name, tensor in named_tensors(twin):
        owner, _, attribute = name.rpartition(".")
        module = twin.get_submodule(owner)
        value = (filled or {}).get(name, tensor)
        if attribute in module.__dict__:
            module.__dict__[attribute] = wide(value)
        elif value is not tensor:
            tensor.data.copy_(value)
    mode = _Upgrade(graph, leaking)
    products = _Products(mode.product, graph)
    with (
        quiet_run(twin, 0, graph.training, dict(graph.answers)),
        looking_inside_functional(),
        mode,
        products,
    ):
        try:
            output = output_of(twin, args, kwargs)
        except Exception as error:  # the model's own code: all of it is reported
            raise DoesNotRunError(
                f"the small model does not run: {type(error).__name__}: {error}",
                why="the plan does not fit the model's code",
                fix="make the plan anew with surgery.plan(...)",
            ) from error
    outputs = named(list(tensor_leaves(output)), graph.named or None)
    left = [
        (said(read), value)
        for read, value in zip(graph.reads, products.left, strict=False)
        if read.node is not None
    ]
    return [*outputs, *left], mode.trace, _exact(graph, mode.exact)


def _lifted(graph: Graph) -> dict[int, list[tuple[int, fx.Node]]]:
    """Where ops read tensors that the model's code made of numbers: place in the trace -> (argument,
    node).
    """
    found: dict[int, list[tuple[int, fx.Node]]] = {}
    for index, call in enumerate(traced(graph)):
        for place, item in enumerate(call.node.args):
            if not isinstance(item, fx.Node) or item.op != "get_attr" or item.target in graph.owned:
                continue
            if graph.tensors[str(item.target)].is_floating_point() and spec(item).shape:
                found.setdefault(index, []).append((place, item))
    return found


def _exact(graph: Graph, found: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """Those of the tensors that are the recorded ones but for rounding to the recorded dtype; where values left torch,
    but for some roundings on the way.
    """

    def same(tensor: Tensor, recorded: Tensor) -> bool:
        rounded = tensor.to(recorded.dtype)
        near = bool(graph.reads) and torch.allclose(rounded, recorded, rtol=ROUNDED, atol=0)
        return near or torch.equal(rounded, recorded)

    return {node: tensor for node, tensor in found.items() if same(tensor, graph.tensors[str(node.target)])}
