"""verify(model, small, plan, inputs) -> Proof: the small model computes what the cut original should.

The reference is the original's recorded graph with all its channels, run in float64 on tensors whose removed
indices are absent: whoever sums over channels reads absent ones as zero, and whoever normalises over channels
does so over those that are present. Nothing here knows of ids, groups or slicing; only the graph and
`plan.kept` enter, so a wrong tie, a wrong slice or a wrongly changed size shows up as a difference.

A run shows nothing of channels that are zero in it. So models with ReLUs or kin, or with weights that are
zero, are run once more: with activations that leak (the size of its input is added to what each gives) and
random numbers in place of those weights. What still carries nothing is counted. A run in eval mode shows
nothing of what only the training mode runs, so that run is compared as well where it differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn

from surgeon.capture.runs import further_runs, record_runs
from surgeon.cut.plan import PLAN, Plan, check_fit, check_roles
from surgeon.errors import ProofError
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.process import plain_torch
from surgeon.graph.queries import read_tensors
from surgeon.graph.tensors import named_tensors
from surgeon.ops.sums import scales
from surgeon.ops.table import Trait, has, op_name
from surgeon.proof.drawn import drawn
from surgeon.proof.finite import OverflowsError, check_finite
from surgeon.proof.kept import check_has_values, check_tensors, kept_of
from surgeon.proof.line_up import changed_constants, line_up
from surgeon.proof.reference import ROUNDED, TOLERANCE, Reference, distance
from surgeon.proof.result import Proof
from surgeon.proof.rounding import FACTOR, Limits, limits
from surgeon.proof.second_look import filled, hides, shown
from surgeon.proof.small_run import DoesNotRunError, run_small


@plain_torch()
def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Graph | Sequence[Graph] | None = None,
    tolerance: float | None = None,
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
        tolerance: the largest relative error that is allowed. None: 1e-9, or, value by value, 16 times what
            moves if each of the original's numbers is moved in the last bit, up to 1e-3. What moves by more than that
            shows nothing, and has to be shown with other numbers in place of zeros.

    Raises:
        InputError: arguments stand in another order.
        PlanError: the plan does not fit the original.
        ProofError: an output differs by more than `tolerance`, or cannot be compared.
    """
    check_given(
        "surgeon.verify(model, small, plan, example_inputs)",
        model=(model, MODEL), small=(small, MODEL), plan=(plan, PLAN),
    )  # fmt: skip
    check_roles(plan, model, small)
    check_fit(plan, model)
    check_has_values(model, small)
    if graph is None:
        runs = record_runs(model, example_inputs, outputs=plan.request.get("outputs")).graphs
    else:
        runs = further_runs(model, [graph]).graphs if isinstance(graph, Graph) else tuple(graph)
    check_tensors(model, small, plan, set().union(*map(read_tensors, runs)))
    looks = [_looked(model, small, plan, run, tolerance) for run in runs]
    unread = set(plan.kept).difference(*(look.shown for look in looks))
    proofs = [look.proof for look in looks]
    hidden = Counter[str]()
    for proof in proofs:
        hidden.update(proof.hidden_at)
    return Proof(
        {path: error for proof in proofs for path, error in proof.errors.items()},
        max(proof.tolerance for proof in proofs),
        max(proof.inner for proof in proofs),
        sum(proof.compared for proof in proofs),
        tuple(dict.fromkeys(said for proof in proofs for said in proof.rescaled)),
        sum(hidden.values()),
        tuple(sorted(unread)),
        dict(hidden),
    )


@dataclasses.dataclass(frozen=True)
class _Look:
    """A proof of one recorded run, and the names of the tensors that it shows something of."""

    proof: Proof
    shown: set[str]


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Both models compared in one run.

    Attributes:
        silent: nodes and paths of values that rounding alone changes so much that nothing is shown of them.
        differs: what to say of them if no other run shows them; None if there are none.
    """

    proof: Proof
    run: Reference
    silent: frozenset[fx.Node | str]
    differs: ProofError | None


def _looked(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph, tolerance: float | None) -> _Look:
    """One recorded run compared, and compared again if it has activations or weights that give zeros, or values of which
    nothing is left but rounding.
    """
    first = _compared(model, small, plan, graph, tolerance)
    proof, hidden, silent = first.proof, first.run.hidden, first.silent
    fill = filled(model, plan.kept)
    leaking = any(
        has(op_name(node), Trait.SATURATES) for node in graph.fx.nodes if node.op == "call_function"
    )
    if leaking or silent or hides(graph, fill):
        with contextlib.suppress(
            OverflowsError, DoesNotRunError
        ):  # then the first run is all there is to see
            second = _compared(model, small, plan, graph, tolerance, leaking, fill)
            hidden = {place: found & second.run.hidden[place] for place, found in hidden.items()}
            proof = _both(first, second)
            silent = silent & second.silent
    if silent and first.differs is not None:
        raise first.differs
    counts = Counter[str]()
    for (node, _), found in hidden.items():
        counts[where(node)] += int(found.sum())
    counts = +counts
    proof = dataclasses.replace(proof, hidden=counts.total(), hidden_at=dict(counts))
    return _Look(proof, shown(graph, first.run.results.keys()))


def _both(first: _Comparison, second: _Comparison) -> Proof:
    """One proof of two runs; of a value that one of them does not show the other one counts."""
    one, other = first.proof, second.proof
    worse = {}
    for path in one.errors:
        shown_in = [each for each in (first, second) if path not in each.silent]
        worse[path] = max((each.proof.errors[path] for each in shown_in), default=math.inf)
    return dataclasses.replace(
        one, errors=worse, inner=max(one.inner, other.inner), tolerance=max(one.tolerance, other.tolerance)
    )


def _compared(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    graph: Graph,
    tolerance: float | None,
    leaking: bool = False,
    fill: Mapping[str, Tensor] | None = None,
) -> _Comparison:
    """One run of both, on random inputs if the model's control flow reads no values.

    Args:
        leaking: with activations that leak.
        fill: numbers of the original to take in place of those of some tensors.
    """
    args, kwargs = drawn(graph)
    outputs, trace, exact = run_small(small, graph, args, kwargs, leaking, kept_of(model, plan, fill or {}))
    with torch.no_grad():
        steps = line_up(graph, trace)
        rescaled = changed_constants(graph, steps)
        results = {n: step.result for n, step in steps.items() if step.result is not None}
        run = Reference(model, graph, plan, rescaled, results, exact if steps else {}, leaking, fill)
        reference = run.run(args, kwargs)
    if [path for path, _ in reference] != [path for path, _ in outputs]:
        raise ProofError(
            "the small model returns other outputs than the original",
            why=f"{[p for p, _ in outputs]} instead of {[p for p, _ in reference]}",
        )
    with torch.no_grad():
        check_finite(
            reference,
            plan,
            lambda other: Reference(model, graph, other, {}, {}, run.exact, leaking, fill),
            args,
            kwargs,
        )
    errors: dict[str, float] = {}
    for (path, (want, mask)), (_, got) in zip(reference, outputs, strict=True):
        errors[path] = distance(path, want, mask, got)
    _check_constants(run)
    said = tuple(
        (where(node), before, after)
        for node, (place, before, after) in rescaled.items()
        if scales(op_name(node), place) and not math.isclose(before, after, rel_tol=ROUNDED)
    )
    allowed = Limits(tolerance or TOLERANCE)
    if tolerance is None and not _within(allowed, run.errors, errors):

        def again(results: Mapping[fx.Node, Tensor], tensors: Mapping[str, Tensor]) -> Reference:
            return Reference(model, graph, plan, rescaled, results, run.exact, leaking, tensors)

        own = {n: t for n, t in {**dict(named_tensors(model)), **(fill or {})}.items() if n in graph.owned}
        with torch.no_grad():
            allowed = limits(again, TOLERANCE, [*results], own, args, kwargs)
    if not _within(allowed, run.errors, errors):
        raise _differs(allowed, run.errors, errors)
    silent = allowed.unshown(run.errors, errors)
    inner = max((error for node, error in run.errors.items() if node not in silent), default=0.0)
    named_errors = {path + graph.label: error for path, error in errors.items()}
    found = Proof(named_errors, allowed.highest, inner, len(run.errors), said)
    named_silent = frozenset(key + graph.label if isinstance(key, str) else key for key in silent)
    strict = dataclasses.replace(allowed, silent=frozenset())
    differs = _differs(strict, run.errors, errors) if silent else None
    return _Comparison(found, run, named_silent, differs)


def _within(allowed: Limits, products: Mapping[fx.Node, float], outputs: Mapping[str, float]) -> bool:
    return allowed.first_above(products) is None and allowed.worst_above(outputs) is None


def _differs(allowed: Limits, products: Mapping[fx.Node, float], outputs: Mapping[str, float]) -> ProofError:
    """What to say of errors of which at least one is too large."""
    node, path = allowed.first_above(products), allowed.worst_above(outputs)
    error, limit = 0.0, allowed.usual
    if node is not None:
        error, limit = products[node], allowed.products.get(node, allowed.usual)
    elif path is not None:
        error, limit = outputs[path], allowed.outputs.get(path, allowed.usual)
    measured = f", {FACTOR} times what rounding changes in the original" if limit > allowed.usual else ""
    return ProofError(
        f"the small model does not compute what the plan says: relative error {error:.2e} (allowed {limit:.0e}{measured})",
        where=where(node) if node is not None else f"output '{path}'",
        why="the plan removes different channels from tensors that belong together, or the small model was changed since",
        fix="make the plan with surgery.plan(...); if it was, please report the model: this is a bug in surgeon",
    )


def _check_constants(run: Reference) -> None:
    """Refuse numbers that changed in the small model's code and should not have."""
    found = run.unexplained()
    if found is not None:
        node, before, after = found
        raise ProofError(
            f"a number in the small model's code became {after:.6g} where the original has {before:.6g}",
            where=where(node),
            why="it scales no sum over a dim that lost such a share of its entries",
            fix="make it a number of its own, set in __init__, or keep the layer with ignore=[...]",
        )
