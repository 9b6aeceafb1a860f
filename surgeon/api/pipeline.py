"""The table of contents: the stages in order.

capture -> propagate -> solve -> groups -> (criteria, choose) -> plan -> rewrite, mend, configure -> verify
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature as inspect_signature
from typing import Any, Unpack

from torch import nn

from surgeon import criteria
from surgeon.api.surgery import Surgery
from surgeon.capture.capture import capture, capture_training
from surgeon.capture.model_state import uncollected
from surgeon.capture.training_branches import decides_by_mode
from surgeon.cut.plan import Plan
from surgeon.errors import CaptureError, InputError
from surgeon.graph.graph import Graph
from surgeon.graph.queries import read_tensors
from surgeon.proof.verify import Proof, verify
from surgeon.recovery.recover import batches_of, check_steps, recover
from surgeon.selection.options import PlanOptions, Ratio, Request


@uncollected()
def inspect(model: nn.Module, example_inputs: Any = None, *, outputs: Sequence[str] | None = None) -> Surgery:
    """Run the model once and find out what can leave.

    Args:
        model: any module; it comes back as it was, its training mode included.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords). Left out: found from the model;
            what was assumed is in `surgery.graph.assumed` and in its print-out.
        outputs: names of the outputs that must stay as they are, such as ["logits"]; all by default. Other
            outputs (hidden states that nobody reads) may lose channels, and the proof does not compare them.

    Raises:
        InputError: no output has one of the names.
        CaptureError: the model does not run, or does something that cannot be recorded.
    """
    graph = capture(model, example_inputs, outputs=outputs)
    further, remarks = _training_run(model, graph)
    return Surgery(model, graph, *further, remarks=remarks)


def _training_run(model: nn.Module, graph: Graph) -> tuple[list[Graph], list[str]]:
    """A run in training mode, for models of which code decides by the mode or some layers (auxiliary
    classifiers, say) only run there.

    Those layers read channels that may leave, so they must be cut along. If the training run fails on the
    inputs (it may need targets) the layers that it would have shown keep their size; the print-out of the
    surgery lists them as unused.
    """
    seen, decides = read_tensors(graph), decides_by_mode(model)
    unused = [name for name, _ in model.named_parameters() if name not in seen]
    if not (unused or decides) or any(tensor.is_meta for tensor in graph.tensors.values()):
        return [], []
    said = (
        [f"{len(unused)} parameters are not used by this run and keep their size, {unused[0]} for one"]
        if unused
        else []
    )
    try:
        run = capture_training(model, graph)
    except CaptureError as error:
        said = said or ["the model decides by the mode what it runs, and only eval mode was seen"]
        return [], [f"{said[0]}; in training mode the model does not run on these inputs ({error.what})"]
    return ([run], []) if decides or not read_tensors(run).isdisjoint(unused) else ([], said)


def shrink(
    model: nn.Module,
    ratio: Ratio | None = None,
    *,
    example_inputs: Any = None,
    outputs: Sequence[str] | None = None,
    calibration: Iterable[Any] | None = None,
    recovery: Sequence[str] | None = None,
    verify: bool = True,
    **options: Unpack[PlanOptions],
) -> nn.Module:
    """A smaller, proven copy of a model, of the same class; the original is untouched.

    `surgeon.shrink(model, 0.5)` removes half of the channels of every group.

    Args:
        ratio: see `Surgery.plan`.
        example_inputs, outputs: see `inspect`.
        calibration: batches of inputs, no labels needed: some hundred to some thousand samples, with which
            accuracy is won back after the proof (see `surgeon.recover`). Criteria that look at data see them
            too, if `data` is left out.
        recovery: its steps; ("refit", "batch_norm") by default. With "distill" behind them it wins most, and
            takes longer.
        verify: prove the surgery in float64 (about two forward passes). On unless switched off.
        options: what else `Surgery.plan` takes: budgets (macs=0.5, params="3M"), criterion, scope, round_to,
            ignore, ...

    Raises:
        InputError, CaptureError, BudgetError, MendError: see `inspect`, `Surgery.plan`, `Plan.apply` and
        `surgeon.recover`.
        ProofError: the small model does not compute what the plan says; this would be a bug in surgeon.
    """
    check_options(ratio, options)  # refuse bad arguments before the model runs
    if recovery is not None:
        check_steps(recovery)
        if calibration is None:
            raise InputError(
                "recovery needs samples", fix="pass calibration=[...], batches of inputs without labels"
            )
    batches = None if calibration is None else batches_of(calibration)
    if batches is not None and criteria.looks_at_data(options.get("criterion", "l1")):
        options.setdefault("data", batches)
    surgery = inspect(model, example_inputs, outputs=outputs)
    if surgery.graph.assumed:
        warnings.warn(surgery.graph.assumed, stacklevel=2)
    plan = surgery.plan(ratio, **options)
    small = plan.apply(model)
    if verify:
        prove(model, small, plan, surgery)
    return small if batches is None else recover(small, plan, model, batches, steps=recovery).model


def check_options(ratio: Ratio | None, options: Mapping[str, Any]) -> None:
    """Refuse what `Surgery.plan` would refuse without looking at a model.

    Raises:
        InputError: see there; TypeError: it has no such argument.
    """
    known = inspect_signature(Surgery.plan).parameters
    for name in options:
        if name not in known:
            raise TypeError(
                f"surgeon has no option {name!r}; Surgery.plan takes {', '.join(list(known)[1:])}"
            )
    fields = {field.name for field in dataclasses.fields(Request)}
    Request(ratio, **{name: value for name, value in options.items() if name in fields})
    criteria.criterion(options.get("criterion", "l1"), options.get("seed", 0))


def prove(model: nn.Module, small: nn.Module, plan: Plan, surgery: Surgery) -> Proof:
    """`verify` with the runs at hand."""
    return verify(model, small, plan, graph=surgery.runs)


__all__ = ["Surgery", "inspect", "prove", "shrink"]
