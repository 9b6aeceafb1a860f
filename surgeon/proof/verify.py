"""verify(model, small, plan, inputs) -> Proof: the small model computes what the cut original should.

The reference is the original's recorded graph with all its channels, run in float64 on tensors whose removed
indices are absent: whoever sums over channels reads absent ones as zero, and whoever normalises over channels
does so over those that are present. Nothing here knows of ids, groups or slicing; only the graph and
`plan.kept` enter, so a wrong tie, a wrong slice or a wrongly changed size shows up as a difference.

A run shows nothing of channels that are zero in it. So models with ReLUs or kin are run once more, with
activations that leak: the size of its input is added to what each gives. What stays zero is counted. A run in
eval mode shows nothing of what only the training mode runs, so that run is compared as well where it differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, nn

from surgeon.capture.runs import further_runs, record_runs
from surgeon.cut.plan import Plan, check_fit
from surgeon.errors import ProofError
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.queries import read_tensors
from surgeon.graph.tensors import named, named_tensors
from surgeon.ops.masked_op import saturates, wide, widened
from surgeon.ops.table import op_name
from surgeon.proof.reference import TOLERANCE, Reference, distance
from surgeon.proof.small_run import float64, line_up, rescaled_constants, run_small


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the small model is from the masked reference.

    Attributes:
        errors: max |small - reference| / max |reference| in float64, per output.
        inner: the same, the largest over the results of all contractions (convolutions, matrix products,
            attention). It counts where an output hides what happened before it, as a classifier that was
            initialised to zero does.
        compared: how many contractions were compared; 0 if the two runs do not line up op by op.
        tolerance: the error up to which the cut counts as right.
        rescaled: constants that the model derives from a width, such as 1/sqrt(head_dim): (place, before,
            after). The reference uses the value after the cut.
        hidden: channels that were zero wherever a contraction read them, so that nothing shows whether they
            are the right ones.
        unread: tensors that were cut and that no run of the proof read.
    """

    errors: Mapping[str, float]
    tolerance: float
    inner: float = 0.0
    compared: int = 0
    rescaled: tuple[tuple[str, float, float], ...] = ()
    hidden: int = 0
    unread: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest error of all outputs and inner results."""
        return max(*self.errors.values(), self.inner)

    def __str__(self) -> str:
        text = f"proof: max relative error {self.error:.1e} in float64"
        text += f" over {len(self.errors)} outputs and {self.compared} products"
        text += (
            f"; {len(self.rescaled)} width-dependent constants follow the new widths" if self.rescaled else ""
        )
        text += (
            f"; {self.hidden} channels were zero throughout, which shows nothing of them"
            if self.hidden
            else ""
        )
        return text + (
            f"; nothing is shown of tensors that no run read: {', '.join(self.unread)}" if self.unread else ""
        )


class _OverflowError(ProofError):
    """An output holds no finite number."""


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Graph | Sequence[Graph] | None = None,
    tolerance: float = TOLERANCE,
) -> Proof:
    """Prove the surgery, in float64, eval mode. Takes about two forward passes of the original; with
    activations that are zero for many inputs (ReLU and kin) twice as many, because a channel that is zero
    shows nothing. Runs in training mode, or with other answers about global modes, are compared as well where
    they compute something else (see `capture.runs`).

    Args:
        model: the original.
        small: what `plan.apply(model)` gave, before any training or recovery.
        plan: the plan.
        example_inputs: as for `inspect`, several calls too; floating-point inputs are replaced by random ones of the same shape
            unless the model's control flow reads values.
        graph: the recorded run of `model`, if there is one already; or several, that in eval mode first.

    Raises:
        PlanError: the plan does not fit the original.
        ProofError: an output differs by more than `tolerance`, or cannot be compared.
    """
    check_fit(plan, model)
    _same_tensors(model, small, plan)
    if graph is None:
        runs = record_runs(model, example_inputs, outputs=plan.request.get("outputs")).graphs
    else:
        runs = further_runs(model, [graph]).graphs if isinstance(graph, Graph) else tuple(graph)
    unread = set(plan.kept).difference(*map(read_tensors, runs))
    proofs = [_looked(model, small, plan, run, tolerance) for run in runs]
    return Proof(
        {path: error for proof in proofs for path, error in proof.errors.items()},
        tolerance,
        max(proof.inner for proof in proofs),
        sum(proof.compared for proof in proofs),
        tuple(dict.fromkeys(said for proof in proofs for said in proof.rescaled)),
        sum(proof.hidden for proof in proofs),
        tuple(sorted(unread)),
    )


def _looked(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, tolerance: float) -> Proof:
    """One recorded run compared, and compared again with activations that leak, if it has some that give
    zeros.
    """
    proof, run = _compared(model, small, plan, graph, tolerance)
    hidden = run.hidden
    if any(saturates(op_name(node)) for node in graph.fx.nodes if node.op == "call_function"):
        with contextlib.suppress(_OverflowError):  # then the first run is all there is to see
            again, leaky = _compared(model, small, plan, graph, tolerance, leaking=True)
            hidden = {node: found & leaky.hidden[node] for node, found in hidden.items()}
            worse = {path: max(error, again.errors[path]) for path, error in proof.errors.items()}
            proof = dataclasses.replace(proof, errors=worse, inner=max(proof.inner, again.inner))
    return dataclasses.replace(proof, hidden=sum(int(found.sum()) for found in hidden.values()))


def _compared(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: Graph,
    tolerance: float,
    leaking: bool = False,
) -> tuple[Proof, Reference]:
    """One run of both, on random inputs if the model's control flow reads no values; `leaking`: with
    activations that do.
    """
    args, kwargs = _double((graph.args, graph.kwargs), drawn=not _reads_values(graph))
    outputs, trace, exact = run_small(small, graph, args, kwargs, leaking)
    outputs = named(outputs, graph.named or None)
    with float64():
        steps = line_up(graph, trace)
        rescaled = rescaled_constants(graph, steps, plan)
        results = {n: step.result for n, step in steps.items() if step.result is not None}
        run = Reference(model, graph, plan, rescaled, results, exact if steps else {}, leaking)
        reference = run.run(args, kwargs)
    if [path for path, _ in reference] != [path for path, _ in outputs]:
        raise ProofError(
            "the small model returns other outputs than the original",
            why=f"{[p for p, _ in outputs]} instead of {[p for p, _ in reference]}",
        )
    errors: dict[str, float] = {}
    for (path, (want, mask)), (_, got) in zip(reference, outputs, strict=True):
        if want.numel() and not bool(torch.isfinite(want).any()):
            raise _OverflowError(
                "an output holds no finite number, so nothing can be compared",
                where=f"output '{path}'",
                why="it overflows in the original as well",
                fix="pass example_inputs for which the model gives numbers",
            )
        errors[path + graph.label] = distance(path, want, mask, got)
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
    return proof, run


def _same_tensors(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Every tensor of the small model is the original's at the kept indices, bit for bit: runs would not see
    dead channels.
    """
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


def _reads_values(graph: Graph) -> bool:
    names = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select"}
    return any(node.op == "call_function" and op_name(node) in names for node in graph.fx.nodes)


def _double(tree: Any, drawn: bool) -> Any:
    """Inputs in float64; those of floating point drawn at random instead, if asked (the same in each
    call).
    """
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
        if not drawn or not (tensor.is_floating_point() or tensor.is_complex()):
            return wide(tensor.detach())
        return torch.randn(tensor.shape, generator=generator, dtype=widened(tensor.dtype)).to(tensor.device)

    return convert(tree)
