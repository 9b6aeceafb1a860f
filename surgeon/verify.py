"""verify(model, small, plan, inputs) -> Proof: the small model computes what the cut original should.

The reference is the original's recorded graph with all its channels, run in float64 on tensors whose removed indices are
absent: whoever sums over channels reads absent ones as zero, and whoever normalises over channels does so over those that are
present. Nothing here knows of ids, groups or slicing; only the graph and `plan.kept` enter, so a wrong tie, a wrong slice or a
wrongly changed size shows up as a difference.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn

from surgeon._decisions import decides, replay
from surgeon._quiet import PlainMode, quiet_run
from surgeon.absence import in_float64, widened
from surgeon.capture import capture
from surgeon.errors import ProofError
from surgeon.graph import Graph, Spec, spec, tensor_leaves, where
from surgeon.plan import Plan
from surgeon.recorder import named_tensors
from surgeon.reference import TOLERANCE, Reference, distance
from surgeon.rules.registry import Family, family, op_name

_OPTIONAL = {"clone", "alias", "detach", "contiguous", "lift_fresh", "empty", "as_strided", "_to_copy"}  # compute nothing
_KEEP = 1 << 27  # entries of the small model's inner results that are kept for comparison (1 GiB)


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the small model is from the masked reference.

    Attributes:
        errors: max |small - reference| / max |reference| in float64, per output.
        inner: the same, the largest over the results of all contractions (convolutions, matrix products, attention). It counts
            where an output hides what happened before it, as a classifier that was initialised to zero does.
        compared: how many contractions were compared; 0 if the two runs do not line up op by op.
        tolerance: the error up to which the cut counts as right.
        rescaled: constants that the model derives from a width, such as 1/sqrt(head_dim): (place, before, after). The
            reference uses the value after the cut.
    """

    errors: Mapping[str, float]
    tolerance: float
    inner: float = 0.0
    compared: int = 0
    rescaled: tuple[tuple[str, float, float], ...] = ()

    @property
    def error(self) -> float:
        """The largest error of all outputs and inner results."""
        return max(*self.errors.values(), self.inner)

    def __str__(self) -> str:
        text = (
            f"proof: max relative error {self.error:.1e} in float64 over {len(self.errors)} outputs and {self.compared} products"
        )
        return text + (f"; {len(self.rescaled)} width-dependent constants follow the new widths" if self.rescaled else "")


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Graph | None = None,
    tolerance: float = TOLERANCE,
) -> Proof:
    """Prove the surgery, in float64, eval mode. Takes about two forward passes of the original.

    Args:
        model: the original.
        small: what `plan.apply(model)` gave, before any training or recovery.
        plan: the plan.
        example_inputs: as for `capture`; floating-point inputs are replaced by random ones of the same shape unless the
            model's control flow reads values.
        graph: the recorded run of `model`, if there is one already.

    Raises:
        ProofError: an output differs by more than `tolerance`, or cannot be compared.
    """
    _same_tensors(model, small, plan)
    graph = graph or capture(model, example_inputs)
    args, kwargs = _double((graph.args, graph.kwargs), random=not _reads_values(graph))
    outputs, trace, exact = _run_small(small, graph, args, kwargs)
    with _float64():
        steps = _line_up(graph, trace)
        rescaled = _rescaled(graph, steps, plan)
        results = {n: step.result for n, step in steps.items() if step.result is not None}
        run = Reference(model, graph, plan, rescaled, results, exact if steps else {})
        reference = run.run(args, kwargs)
    if [path for path, _ in reference] != [path for path, _ in outputs]:
        raise ProofError(
            "the small model returns other outputs than the original",
            why=f"{[p for p, _ in outputs]} instead of {[p for p, _ in reference]}",
        )
    errors: dict[str, float] = {}
    for (path, (want, mask)), (_, got) in zip(reference, outputs, strict=True):
        if want.numel() and not bool(torch.isfinite(want).any()):
            raise ProofError(
                "an output holds no finite number, so nothing can be compared",
                where=f"output '{path}'",
                why="it overflows in the original as well",
                fix="pass example_inputs for which the model gives numbers",
            )
        errors[path] = distance(path, want, mask, got)
    said = tuple((where(node), before, after) for node, (_, before, after) in rescaled.items())
    proof = Proof(errors, tolerance, run.inner, run.compared, said)
    if not proof.error <= tolerance:
        worst = max(errors, key=lambda p: errors[p] if errors[p] == errors[p] else math.inf)
        raise ProofError(
            f"the small model does not compute what the plan says: relative error {proof.error:.2e} (allowed {tolerance:.0e})",
            where=where(run.first_bad) if run.first_bad is not None else f"output '{worst}'",
            why="the plan removes different channels from tensors that belong together, or the small model was changed since",
            fix="make the plan with surgery.plan(...); if it was, please report the model: this is a bug in surgeon",
        )
    return proof


def _same_tensors(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Every tensor of the small model is the original's at the kept indices, bit for bit: runs would not see dead channels."""
    cut, first = dict(named_tensors(small)), dict[int, str]()
    for name, tensor in named_tensors(model):
        want = tensor.detach()
        tied = first.setdefault(id(tensor), name)  # a plan names a tied tensor once
        for dim, kept in plan.kept.get(name, plan.kept.get(tied, {})).items():
            want = want.index_select(dim, torch.as_tensor(kept, device=want.device))
        got = cut.get(name)
        if got is None or got.shape != want.shape or not torch.equal(got.detach(), want):
            raise ProofError(
                "a tensor of the small model is not the original's at the kept indices",
                where=name,
                why="the small model was changed since the cut, or comes from other weights or another plan",
                fix="prove right after plan.apply(model), before training, recovery or fusion",
            )


# -- the small model ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _reads_values(graph: Graph) -> bool:
    names = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select"}
    return any(node.op == "call_function" and op_name(node) in names for node in graph.fx.nodes)


def _double(tree: Any, random: bool) -> Any:
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}

    def convert(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in made:
                made[id(item)] = fresh(item)
            return made[id(item)]
        if isinstance(item, dict):
            return {k: convert(v) for k, v in item.items()}
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*[convert(v) for v in item])
        return type(item)(convert(v) for v in item) if isinstance(item, list | tuple) else item

    def fresh(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if not random:
            return tensor.detach().to(torch.float64)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    return convert(tree)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One op of the small model's run: its name, the numbers among its arguments, its result if it is a contraction."""

    name: str
    constants: dict[int, float]
    result: Tensor | None


class _Upgrade(PlainMode):
    """Runs code that asks for float32 by name in float64, and notes the constants of every op."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.trace: list[_Step] = []
        self.room = _KEEP
        self.lifted = _lifted(graph)
        self.exact: dict[fx.Node, Tensor] = {}
        self.decisions = [call.node for call in graph.calls if "decision" in call.node.meta][::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        args, kwargs = widened(args), {k: widened(v) for k, v in (kwargs or {}).items()}
        for place, node in self.lifted.get(len(self.trace), ()):
            if place < len(args) and isinstance(args[place], Tensor):
                self.exact[node] = args[place].clone()
        result = self._decided(func, args, kwargs)
        if result is None:
            result = in_float64(func)(*args, **kwargs)
        if name == "lift_fresh" and result.is_floating_point():  # a tensor that the code makes of numbers, by name in float32
            result = result.to(torch.float64)
        if name.rstrip("_") not in _OPTIONAL and not _of_indices([t.dtype for t in _leaves(args)]):
            self.trace.append(_Step(name.rstrip("_"), _constants(args), self._kept(name, result)))
        return result

    def _decided(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The original's decision, so that both take one path; decisions come in the same order in both runs."""
        if not decides(func, args, kwargs) or not self.decisions or self.decisions[-1].target is not func:
            return None
        return replay(self.decisions.pop(), args, kwargs)

    def _kept(self, name: str, result: Any) -> Tensor | None:
        first = result[0] if isinstance(result, list | tuple) and result else result
        if family(name) is not Family.CONTRACTION or not isinstance(first, Tensor) or first.numel() > self.room:
            return None
        self.room -= first.numel()
        return first.clone()


def _of_indices(dtypes: list[torch.dtype]) -> bool:
    """Whether an op works on whole numbers alone, or on nothing: code may remember what such ops gave, and not run them again."""
    return not any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)


def _leaves(args: Any) -> list[Tensor]:
    return [item for item in torch.utils._pytree.tree_leaves(args) if isinstance(item, Tensor)]


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    return [spec(n).dtype for n in node.all_input_nodes]


def _constants(args: Any) -> dict[int, float]:
    """The numbers among an op's arguments by position, those in tensors without dims too."""
    numbers = {}
    for place, item in enumerate(args):
        single = isinstance(item, Tensor) and item.dim() == 0 and not item.is_complex()
        if single or (isinstance(item, int | float) and not isinstance(item, bool)):
            numbers[place] = float(item)
    return numbers


_Run = tuple[list[tuple[str, Tensor]], list["_Step"], dict[fx.Node, Tensor]]


def _run_small(small: nn.Module, graph: Graph, args: Any, kwargs: Any) -> _Run:
    twin = copy.deepcopy(small).to(torch.float64)
    for name, tensor in named_tensors(twin):
        owner, _, attribute = name.rpartition(".")
        module = twin.get_submodule(owner)
        if attribute in module.__dict__ and tensor.is_floating_point():
            module.__dict__[attribute] = tensor.to(torch.float64)
    mode = _Upgrade(graph)
    with _float64(), quiet_run(twin, seed=0), mode:
        try:
            output = twin(*args, **kwargs)
        except Exception as error:
            raise ProofError(
                f"the small model does not run: {type(error).__name__}: {error}",
                why="the plan does not fit the model's code",
                fix="make the plan anew with surgery.plan(...)",
            ) from error
    return list(tensor_leaves(output)), mode.trace, _exact(graph, mode.exact)


def _traced(graph: Graph) -> list[fx.Node]:
    """The recorded ops that a trace holds."""
    return [c.node for c in graph.calls if op_name(c.node) not in _OPTIONAL and not _of_indices(_dtypes(c.node))]


def _lifted(graph: Graph) -> dict[int, list[tuple[int, fx.Node]]]:
    """Where ops read tensors that the model's code made of numbers: place in the trace -> (argument, node)."""
    found: dict[int, list[tuple[int, fx.Node]]] = {}
    for index, node in enumerate(_traced(graph)):
        for place, item in enumerate(node.args):
            if not isinstance(item, fx.Node) or item.op != "get_attr" or item.target in graph.owned:
                continue
            if graph.tensors[str(item.target)].is_floating_point() and spec(item).shape:
                found.setdefault(index, []).append((place, item))
    return found


def _exact(graph: Graph, found: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """Those of the tensors that are the recorded ones but for rounding to the recorded dtype."""
    return {
        node: tensor
        for node, tensor in found.items()
        if torch.equal(tensor.to(graph.tensors[str(node.target)].dtype), graph.tensors[str(node.target)])
    }


def _line_up(graph: Graph, trace: list[_Step]) -> dict[fx.Node, _Step]:
    """The steps of the small model's run by the node that they belong to; {} if the runs differ in their ops."""
    calls = _traced(graph)
    alike = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}
    if len(calls) != len(trace):
        return {}
    for node, step in zip(calls, trace, strict=True):
        if alike.get(step.name, step.name) != alike.get(op_name(node), op_name(node)):
            return {}
    return dict(zip(calls, trace, strict=True))


def _rescaled(graph: Graph, steps: Mapping[fx.Node, _Step], plan: Plan) -> dict[fx.Node, tuple[int, float, float]]:
    """Constants that differ between the two runs by a power of a share that the plan keeps: node -> (position, old, new)."""
    shares: set[float] = set()
    for name, dims in plan.kept.items():
        for dim, kept in dims.items():
            shares.add(len(kept) / graph.tensors[name].shape[dim])
    found: dict[fx.Node, tuple[int, float, float]] = {}
    for node, step in steps.items():
        if family(step.name) is not Family.ELEMENTWISE:
            continue
        for place, after in step.constants.items():
            before = _number(graph, node.args[place])
            if before is None:
                continue
            if before > 0 and after > 0 and abs(after / before - 1) > 1e-12 and _explained(before, after, shares):
                found[node] = (place, before, after)
    return found


def _number(graph: Graph, item: Any) -> float | None:
    """A number that the model's code passed, perhaps as a tensor without dims that it made on the way."""
    if isinstance(item, fx.Node):
        made = _made(graph, item) if isinstance(item.meta["spec"], Spec) and spec(item).shape == () else None
        return None if made is None or made.is_complex() else float(made)
    return float(item) if isinstance(item, int | float) and not isinstance(item, bool) else None


def _made(graph: Graph, node: fx.Node) -> Tensor | None:
    """The value of a node that hangs on nothing but numbers in the model's code."""
    if node.op == "get_attr":
        return None if node.target in graph.owned else graph.tensors[str(node.target)]
    if node.op != "call_function":
        return None
    inputs = {n: _made(graph, n) for n in node.all_input_nodes}
    if not inputs or any(value is None for value in inputs.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: inputs[n])
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]  # an op
    return result


_FINEST = torch.finfo(torch.float64).eps
_EPSILONS = {torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def _explained(before: float, after: float, shares: set[float]) -> bool:
    if before in _EPSILONS and after == _FINEST:  # torch takes the dtype's epsilon where none is given
        return True
    ratio = after / before
    return any(abs(ratio / share**power - 1) < 1e-9 for share in shares for power in (-1, -0.5, -0.25, 0.25, 0.5, 1))
