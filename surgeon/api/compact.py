"""compact(model): channels that masks or zeros have switched off leave physically, and nothing changes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgeon.api.pipeline import check_order, inspect, prove
from surgeon.api.surgery import Surgery
from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.cut.plan import Plan, carrying
from surgeon.errors import InputError, NothingRemovedWarning, PathWarning, ProofError, SurgeonError, warn
from surgeon.graph.check_model import check_model
from surgeon.graph.given import MODEL, check_given
from surgeon.graph.given import said as kind_of
from surgeon.graph.graph import Graph
from surgeon.graph.process import plain_torch
from surgeon.masks.fold import Fold, can_take, exact, folds, take_over
from surgeon.masks.prune_masks import (
    check_pruned,
    check_values,
    masked,
    plain_name,
    plan_without,
    settle,
    zeros,
)
from surgeon.masks.removable import removable
from surgeon.masks.signals import Signals
from surgeon.ops.ids import DimIds
from surgeon.proof.equal import check_equal
from surgeon.proof.other_runs import answers_inputs, first_difference, written_state
from surgeon.report.text import count
from surgeon.selection.selection import Selection

_SHOWN = 8  # lines of a kind that a print-out has


@dataclasses.dataclass(frozen=True)
class Kept:
    """Channels of a group that are zero or constant and stay.

    Attributes:
        group: its name. channels: how many. why: the op and the reason.
    """

    group: str
    channels: int
    why: str


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A model without the channels that changed nothing; printable.

    Attributes:
        model: of the same class, smaller.
        plan: what stays, for a model with the masks that are left (`masked`) and no other; what biases took over is in the small
            model's weights alone.
        removed: group -> how many of how many channels left.
        folded: what biases and running means took over from channels that were constants.
        kept: channels that are zero or constant and stay, with the reason.
        masked: tensors that still have a mask: what it hides is no whole channel.
        error: the largest relative difference from the masked model's outputs, in float64.
        zeros: how many of the small model's weights are zero; weights: how many there are.
    """

    model: nn.Module
    plan: Plan
    removed: Mapping[str, tuple[int, int]]
    folded: tuple[Fold, ...]
    kept: tuple[Kept, ...]
    masked: tuple[str, ...]
    error: float
    zeros: int
    weights: int

    def __str__(self) -> str:
        plan = self.plan
        params, macs = (plan.params_before, plan.params), (plan.macs_before, plan.macs)
        sizes = "{} -> {} params, {} -> {} MACs".format(*map(count, (*params, *macs)))
        lines = [
            f"{type(self.model).__name__}: {sizes}; outputs within {self.error:.1e} of the masked model's"
        ]
        lines += _listed(
            "removed", [f"{name}: {gone} of {every} channels" for name, (gone, every) in self.removed.items()]
        )
        lines += _listed(
            "folded", [f"{fold.tensor} takes over {fold.channels} constant channels" for fold in self.folded]
        )
        lines += _listed(
            "kept", [f"{kept.group}: {kept.channels} channels, because {kept.why}" for kept in self.kept]
        )
        lines += _listed("still masked", list(self.masked))
        if self.zeros:
            lines.append(
                f"{count(self.zeros)} of {count(self.weights)} weights are zero and stay: dense kernels gain nothing by them"
            )
        return "\n".join(lines)


def _listed(title: str, found: Sequence[str]) -> list[str]:
    more = len(found) - _SHOWN
    lines = [f"  {line}" for line in found[:_SHOWN]] + ([f"  and {more} more"] if more > 0 else [])
    return [f"{title}:", *lines] if found else []


@plain_torch()
def compact(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    permanent: bool = False,
) -> Compaction:
    """Remove every channel whose removal changes nothing: masked by `torch.nn.utils.prune`, by `masks`, or zero.

    A channel leaves where it is zero for all inputs, where the weights that read it are zero, or where it is a constant (a
    filter of zeros behind a bias or a batch norm) that the readers' biases can take over exactly. That is read off the weights
    and the graph: an activation that happens to be zero for the example inputs is no reason.

    Args:
        model: with masks or zeros; it is not touched.
        example_inputs: as for `inspect`.
        masks: {name of a tensor: a mask of its shape}; entries that are 0 or False are set to zero first.
        permanent: multiply masks that are left into the weights, so that `torch.nn.utils.prune.is_pruned` is False. Otherwise
            only masks that hide nothing any more are taken off.

    Raises:
        InputError: nothing of the model is zero; all that leads to the outputs is; a mask does not fit, is half there, or is of
            a tensor that modules share.
        CaptureError, MendError: see `inspect` and `Plan.apply`.
        ProofError: the outputs differ from the masked model's by more than 1e-9 in float64; this would be a bug in surgeon.

    Warns:
        NothingRemovedWarning: what is zero makes no whole channel that may leave.
    """
    check_given("surgeon.compact(model, example_inputs)", model=(model, MODEL))
    check_order(model, example_inputs)
    if masks is not None and not isinstance(masks, Mapping):
        raise InputError(
            f"masks is {kind_of(masks)}", fix="pass masks={name of a tensor: a mask of its shape}"
        )
    check_model(model)
    check_values(model)
    check_pruned(model)
    before = model if masks is None else masked(model, masks)
    surgery = inspect(before, example_inputs)
    if surgery.unseen:
        warn(f"nothing is shown of paths that were not seen: {surgery.unseen[0]}", PathWarning)
    runs = [graph for graph in surgery.runs if not graph.training]
    written = written_state(before, runs[0])
    looks = [_looked(surgery, graph, written) for graph in runs]
    if not any(look.alive for look in looks) or not answers_inputs(before, runs[0]):
        raise InputError(
            "the outputs hang on no input",
            why="all that leads to them is zero",
            fix="use masks that leave a way through",
        )
    small, plan, choice, found, numbers, error = _proved(surgery, looks, runs)
    if not plan.kept:
        _nothing(before, looks)
    take_over(small, numbers)
    off, left = settle(small, permanent)
    plan = plan_without(plan, before, off)
    carrying(small, model, plan)
    return Compaction(
        small,
        plan,
        _removed(surgery, choice),
        tuple(found),
        tuple(_kept(surgery, looks, choice)),
        tuple(left),
        error,
        *zeros(small),
    )


def _looked(surgery: Surgery, graph: Graph, written: Collection[str]) -> Signals:
    """What carries a signal in one run; constants that nothing can take over do."""
    look = Signals(surgery.model, graph, surgery.propagation, surgery.solution, written)
    look.look()
    for constants in list(look.constants):
        if not can_take(graph, constants):
            look.block(
                constants, "it is a constant, and what reads it has no bias of its own that could take over"
            )
    return look


_Made = tuple[nn.Module, Plan, DimIds, list[Fold], dict[str, Tensor], float]


def _proved(surgery: Surgery, looks: Sequence[Signals], runs: Sequence[Graph]) -> _Made:
    """The small model before biases are rounded, its plan, what left, what is folded in which numbers, and the error.

    Where constants turn out to hang on sizes or on what was called before, they stay. Where the cut changes other numbers of
    the code, groups that are to blame stay.

    Raises:
        ProofError: the outputs differ even so.
    """
    try:
        made = _cut(surgery, looks, runs)
        said = first_difference(surgery.model, made[0], runs[0], made[4]) if made[3] else ""
        if not said:
            return made
        _block_constants(looks, f"it is a constant that is another one for {said}")
    except ProofError:
        _block_groups(surgery, looks, runs)
    return _cut(surgery, looks, runs)


def _cut(surgery: Surgery, looks: Sequence[Signals], runs: Sequence[Graph]) -> _Made:
    carries = np.any([look.carries for look in looks], axis=0)
    small, plan = surgery.cut_chosen(lambda links: _selection(surgery, carries, links))
    prove(surgery.model, small, plan, surgery)
    choice = removable(surgery, carries)
    found = folds(runs[0], surgery.shapes, looks[0].constants, choice)
    numbers = exact(small, plan, found)
    error = max(check_equal(surgery.model, small, graph, numbers) for graph in runs)
    return small, plan, choice, found, numbers, error


def _block_constants(looks: Sequence[Signals], why: str) -> None:
    for look in looks:
        for constants in look.constants:
            look.block(constants, why)
        look.constants.clear()


def _block_groups(surgery: Surgery, looks: Sequence[Signals], runs: Sequence[Graph]) -> None:
    """Keep the groups of which a part cannot leave without effect, found by cutting each alone."""
    carries = np.any([look.carries for look in looks], axis=0)
    alone: list[Group] = [group for group in surgery.groups if not carries[group.sets].all()]
    before = [look.carries.copy() for look in looks]
    guilty: list[Group] = []
    for group in alone:
        for look, kept in zip(looks, before, strict=True):
            look.carries = np.ones_like(kept)
            look.carries[group.sets] = kept[group.sets]
        try:
            _cut(surgery, looks, runs)
        except SurgeonError:
            guilty.append(group)
    for look, kept in zip(looks, before, strict=True):
        look.carries = kept
        for group in guilty:
            look.keep(group.sets.ravel(), "its removal changes other numbers of the model's code")


def _selection(surgery: Surgery, carries: DimIds, links: Sequence[Link]) -> Selection:
    choice = removable(surgery, carries, links)
    return Selection.of(surgery.shapes, choice, surgery.cost, {"compact": True})


def _nothing(model: nn.Module, looks: Sequence[Signals]) -> None:
    """Say that nothing leaves.

    Raises:
        InputError: nothing of the model is zero.
    """
    weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    dense = all(bool((weight != 0).all()) for weight in weights) and not zeros(model)[0]
    if dense and not any(look.stays for look in looks):
        raise InputError(
            "nothing of this model is zero",
            why="compact removes what masks or training have set to zero, and chooses nothing itself",
            fix="prune it first (torch.nn.utils.prune), pass masks={...}, or use surgeon.shrink(model, 0.5)",
        )
    warn("nothing leaves: what is zero makes no whole channel that may leave", NothingRemovedWarning)


def _removed(surgery: Surgery, choice: DimIds) -> dict[str, tuple[int, int]]:
    counts = {g.name: (round(float(choice[g.sets].mean()) * g.width), g.width) for g in surgery.groups}
    return {plain_name(name): found for name, found in counts.items() if found[0]}


def _kept(surgery: Surgery, looks: Sequence[Signals], choice: DimIds) -> list[Kept]:
    """By group and reason."""
    reasons: dict[int, str] = {}
    for look in looks:
        reasons |= look.stays
    carries = np.any([look.carries for look in looks], axis=0)
    found: dict[tuple[str, str], int] = defaultdict(int)
    for group in surgery.groups:
        for atom in group.sets.ravel():
            if choice[atom]:
                continue
            if int(atom) in reasons:
                found[group.name, reasons[int(atom)]] += 1
            elif not carries[atom]:
                found[group.name, "what leaves with it, or one channel of the group, has to stay"] += 1
    return [Kept(plain_name(name), number, why) for (name, why), number in found.items()]
