"""sensitivity(surgery, ...) -> how much the outputs (or a loss) change when one group alone loses some of its
channels.
"""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgeon.capture.inputs import normalize
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.cut.inspected import Inspected
from surgeon.cut.plan import Plan
from surgeon.errors import BudgetError, InputError, MissingExtraError, NothingRemovedWarning
from surgeon.graph.tensors import tensor_leaves

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Changes by group and ratio.

    Attributes:
        ratios: what was tried.
        changes: {group: one change per ratio}; the relative change of the outputs (L2), or the rise of the
            loss. None where the group cannot lose that much.
        names: {group: the tensors that make its channels}, as `Surgery.plan(ratio={...})` takes them.
        what: "outputs" or "loss".
    """

    ratios: tuple[float, ...]
    changes: dict[str, tuple[float | None, ...]]
    names: dict[str, tuple[str, ...]]
    what: str

    def within(self, limit: float) -> dict[str, float]:
        """Per group the largest tried ratio whose change is at most `limit`: ready for
        `surgery.plan(ratio=...)`.
        """
        found: dict[str, float] = {}
        for group, changes in self.changes.items():
            fine = [
                r
                for r, change in zip(self.ratios, changes, strict=True)
                if change is not None and change <= limit
            ]
            found |= dict.fromkeys(self.names[group], max(fine, default=0.0))
        return found

    def table(self) -> Table:
        """A rich table, the most sensitive group first."""
        from rich.table import Table

        table = Table(title=f"change of the {self.what}")
        table.add_column("group", overflow="fold")
        for ratio in self.ratios:
            table.add_column(f"{ratio:.0%}", justify="right")
        for group in sorted(
            self.changes, key=lambda g: -max((c for c in self.changes[g] if c is not None), default=0.0)
        ):
            table.add_row(
                group, *["-" if change is None else f"{change:.3g}" for change in self.changes[group]]
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        sink = io.StringIO()
        Console(file=sink, width=130, color_system=None, force_terminal=False).print(self.table())
        return sink.getvalue().rstrip()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a chart: one line per group, change over ratio.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError(
                "charts need matplotlib", why=str(error), fix='pip install "surgeon-torch[analysis]"'
            ) from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for group, changes in self.changes.items():
            points = [(r, c) for r, c in zip(self.ratios, changes, strict=True) if c is not None]
            axes.plot([r for r, _ in points], [c for _, c in points], marker="o", label=group)
        axes.set_xlabel("share of the group's channels removed")
        axes.set_ylabel(f"change of the {self.what}")
        if len(self.changes) <= 12:
            axes.legend(fontsize="x-small")
        figure.savefig(path)


def sensitivity(
    surgery: Inspected,
    data: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    n_jobs: int | None = None,
    **options: Any,
) -> Sensitivity:
    """See `Surgery.sensitivity`."""
    try:
        import joblib
    except ImportError as error:
        raise MissingExtraError(
            "sensitivity needs joblib", why=str(error), fix='pip install "surgeon-torch[analysis]"'
        ) from error
    if not ratios or any(not 0 < ratio < 1 for ratio in ratios):
        raise InputError(f"ratios {tuple(ratios)} must be shares in (0, 1)")
    if loss is not None and data is None:
        raise InputError("a loss needs data", fix="pass batches of pairs (inputs, targets)")
    batches = [(surgery.graph.kwargs or surgery.graph.args, None)] if data is None else [
        batch if loss is not None else (batch, None) for batch in data
    ]  # fmt: skip
    model = surgery.model
    before = _answers(model, batches, loss)
    options.setdefault("round_to", 1)
    jobs: list[tuple[str, Plan | None]] = []
    groups = surgery.groups_without(options.get("ignore", ()), options.get("ignore_inputs", ()))
    for group in groups:
        for ratio in ratios:
            asked = {"*": 0.0, **dict.fromkeys(group.producers, ratio)}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", NothingRemovedWarning)
                    plan = surgery.plan(asked, **options)
            except BudgetError:
                plan = None
            jobs.append((group.name, plan if plan is not None and plan.kept else None))
    run = joblib.Parallel(n_jobs=n_jobs)
    plans = [plan for _, plan in jobs if plan is not None]
    found = iter(run(joblib.delayed(_change)(model, plan, batches, loss, before) for plan in plans))
    changes: dict[str, list[float | None]] = {group.name: [] for group in groups}
    for name, plan in jobs:
        changes[name].append(None if plan is None else next(found))
    return Sensitivity(
        tuple(ratios),
        {name: tuple(values) for name, values in changes.items()},
        {group.name: group.producers for group in groups},
        "outputs" if loss is None else "loss",
    )


def _change(model: nn.Module, plan: Plan, batches: list[Any], loss: Any, before: list[Any]) -> float:
    after = _answers(plan.apply(model), batches, loss)
    if loss is not None:
        return float(sum(after) - sum(before)) / len(before)
    off = sum(
        float((a - b).pow(2).sum())
        for new, old in zip(after, before, strict=True)
        for a, b in zip(new, old, strict=True)
    )
    size = sum(float(b.pow(2).sum()) for old in before for b in old)
    return float((off / max(size, 1e-300)) ** 0.5)


def _answers(model: nn.Module, batches: list[Any], loss: Any) -> list[Any]:
    """Per batch the loss, or the float outputs in float64."""
    found: list[Any] = []
    for inputs, targets in batches:
        args, kwargs = normalize(inputs)
        with torch.no_grad(), quiet_run(model, seed=0):
            output = output_of(model, args, kwargs)
            if loss is not None:
                found.append(float(loss(output, targets)))
            else:
                found.append([t.double() for _, t in tensor_leaves(output) if t.is_floating_point()])
    return found
