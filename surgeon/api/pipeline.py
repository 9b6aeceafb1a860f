"""The table of contents: the stages in order.

capture -> propagate -> solve -> groups -> (criteria, choose) -> plan -> rewrite, mend, configure -> verify
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from torch import fx, nn

from surgeon import criteria
from surgeon.api.surgery import Surgery
from surgeon.capture.model_state import at_work
from surgeon.capture.paths.decisions import said
from surgeon.capture.runs import record_runs
from surgeon.coupling.analysis import Analysis, analyse
from surgeon.cut.plan import Plan
from surgeon.errors import AssumedWarning, InputError, PathWarning, ProofWarning, warn
from surgeon.graph.graph import Graph
from surgeon.proof.result import Proof
from surgeon.proof.verify import verify
from surgeon.selection.options import PlanOptions, Ratio, takes_options
from surgeon.selection.request import Request


@at_work()
def inspect(model: nn.Module, example_inputs: Any = None, *, outputs: Sequence[str] | None = None) -> Surgery:
    """Run the model, in eval mode and, if its code asks for the mode, in training mode, and find out what can leave.

    Args:
        model: any module; it comes back as it was, its training mode included.
        example_inputs: a tensor, a tuple (positional), a dict (keywords), or several calls in `surgeon.Calls`:
            other sizes, other optional arguments. Left out: found from the model; what was assumed is in
            `surgery.graph.assumed` and in its print-out.
        outputs: names of the outputs that must stay as they are, such as ["logits"]; all by default. Other
            outputs (hidden states that nobody reads) may lose channels, and the proof does not compare them.

    Raises:
        InputError: no output has one of the names.
        CaptureError: the model does not run, or does something that cannot be recorded.
    """
    check_order(model, example_inputs)
    runs = record_runs(model, example_inputs, outputs=outputs)
    analysis = analyse(*runs.graphs)
    unseen = tuple(dict.fromkeys((*runs.unseen, *_decided(analysis))))
    assumed = [analysis.graph.assumed] if analysis.graph.assumed else []
    remarks = [*assumed, *runs.remarks, *_without_values(analysis.graph), *unseen]
    return Surgery(model, analysis, remarks, unseen)


def _decided(analysis: Analysis) -> list[str]:
    """Where the model's code decided by a value or a size that hangs on the inputs."""

    def varies(node: fx.Node, dim: int) -> bool:
        ids = analysis.propagation.axes.get(node, {})
        return isinstance(ids, dict) and dim not in ids and node.op != "get_attr"

    return list(said(itertools.chain.from_iterable(run.decisions for run in analysis.runs), varies))


def _without_values(graph: Graph) -> list[str]:
    if not any(graph.tensors[name].is_meta for name in graph.owned):
        return []
    return [
        "the weights have no values (meta device): a plan says how many channels stay, and takes the first"
    ]


@takes_options
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

    Raises:
        InputError, CaptureError, BudgetError, MendError: see `inspect`, `Surgery.plan`, `Plan.apply` and
        `surgeon.recover`.
        ProofError: the small model does not compute what the plan says; this would be a bug in surgeon.

    Warns:
        PathWarning: the model's code decided by a value, a size or a mode; see `Surgery.unseen`.
        ProofWarning: numbers in the model's code follow the new widths, or the proof could not show all.
    """
    check_order(model, ratio, example_inputs)
    check(ratio, **options)  # before the model runs
    from surgeon.recovery.options import batches_of, check_steps
    from surgeon.recovery.recover import recover

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
        warn(surgery.graph.assumed, AssumedWarning)
    if surgery.unseen:
        warn(_unseen(surgery.unseen), PathWarning)
    small, plan = surgery.cut(ratio, **options)
    if verify:
        for remark in prove(model, small, plan, surgery).not_shown:
            warn(remark, ProofWarning)
    return small if batches is None else recover(small, plan, model, batches, steps=recovery).model


_SAID = 5  # paths that a warning names


def _unseen(paths: Sequence[str]) -> str:
    more = len(paths) - _SAID
    listed = "".join(f"\n  {path}" for path in paths[:_SAID]) + (f"\n  and {more} more" if more > 0 else "")
    return (
        f"the model's code can take paths that were not seen, and nothing is shown of them:{listed}\n  do: pass inputs for"
        " the other ways as well, example_inputs=surgeon.Calls([...]); surgery.unseen lists all"
    )


def check_order(model: Any, *others: Any) -> None:
    """Refuse arguments that were swapped.

    Raises:
        InputError: a module stands where none belongs, and none where the model does; or a number stands for inputs.
    """
    swapped = next((item for item in others if isinstance(item, nn.Module)), None)
    if swapped is not None:
        raise InputError(
            f"a {type(swapped).__name__} was passed where no module belongs, and a {type(model).__name__} as the model",
            why="arguments look swapped",
            fix="the model comes first: surgeon.shrink(model, 0.5, example_inputs=x), surgeon.inspect(model, x)",
        )
    if isinstance(others[-1], int | float):
        raise InputError(
            f"example_inputs is the number {others[-1]!r}",
            why="a ratio belongs to surgeon.shrink(model, 0.5) or surgery.plan(0.5)",
            fix="pass inputs as the model takes them: a tensor, a tuple or a dict",
        )


def check(ratio: Ratio | None, **options: Unpack[PlanOptions]) -> None:
    """Refuse what `Surgery.plan` would refuse without looking at a model.

    Raises:
        InputError: see there.
    """
    request = Request.of(ratio, **options)
    criteria.criterion(request.options["criterion"], request.options["seed"])


def prove(model: nn.Module, small: nn.Module, plan: Plan, surgery: Surgery) -> Proof:
    """`verify` with the runs at hand."""
    return verify(model, small, plan, graph=surgery.runs)


__all__ = ["Surgery", "inspect", "prove", "shrink"]
