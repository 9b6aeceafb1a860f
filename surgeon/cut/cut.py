"""Selection -> (small module, Plan): slice, then find which numbers in the model's code must change.

A plan needs no small module of its own: what the code needs changed is found on a rough copy, which has the
small module's shapes and any of the model's values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from surgeon.cut.plan import Plan, carrying
from surgeon.cut.slice import Slicer, rough_slice, shrink_module
from surgeon.errors import ConfigWarning, MendError, WidthWarning, warn
from surgeon.graph.graph import Graph
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.checking.size_check import check
from surgeon.mend.config_model import ConfigModel
from surgeon.mend.config_sync import configure, unsaid
from surgeon.mend.edits import Edit
from surgeon.mend.mend import find_edits
from surgeon.mend.unread.widths import follow_widths
from surgeon.selection.cost import ShapeModel
from surgeon.selection.selection import Selection

_SAID = 5  # numbers that a warning names


class Cutter:
    """Cuts a model as selections say.

    Args:
        model: only read.
        runs: its recorded runs, the one in eval mode first.
        shapes: of these runs.
        config: what the model's config can say of its sizes; None if its class is not built from one.
    """

    def __init__(
        self, model: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, config: ConfigModel | None = None
    ) -> None:
        self.model, self.runs, self.shapes, self.config = model, runs, shapes, config

    @torch.inference_mode(mode=False)  # whatever the caller is in: the small model can be trained
    def cut(self, selection: Selection) -> tuple[nn.Module, Plan]:
        """The small model, and the plan that gives it.

        Raises:
            MendError: the model's code holds a size that cannot be changed, or a part of the original would
                still be used.
            PlanError: no config says what is left, and the request asks for one.
        """
        small = shrink_module(self.model, selection.kept)
        plan = self._plan(selection, small)
        plan.warn()
        return carrying(small, self.model, plan), plan

    @torch.inference_mode(mode=False)
    def plan(self, selection: Selection) -> Plan:
        """The plan alone.

        Raises:
            MendError, PlanError: as `cut`.
        """
        return self._plan(selection, shrink_module(self.model, selection.kept, slicer=Slicer(rough_slice)))

    def _plan(self, selection: Selection, small: nn.Module) -> Plan:
        """The plan of what was sliced; its edits are made in `small`."""
        mended = find_edits(small, self.runs, self.shapes, selection.choice)
        rescaled = {"rescaled": [str(number) for number in mended.rescaled]} if mended.rescaled else {}
        return Plan(
            kept=selection.kept,
            hash=self.runs[0].hash,
            macs=selection.cost.macs,
            params=selection.cost.params,
            size=selection.cost.size,
            memory=selection.cost.memory,
            macs_before=selection.before.macs,
            params_before=selection.before.params,
            edits=(*mended.edits, *self._unread(selection, small), *self._config_edits(selection, small)),
            request={**selection.request, **rescaled},
        )

    def _unread(self, selection: Selection, small: nn.Module) -> tuple[Edit, ...]:
        """Edits of numbers that say widths and that no run reads; they are undone if a run does notice them."""
        if not selection.kept:
            return ()
        edits, undecided = follow_widths(small, self.model, self.runs[0])
        before = self._numbers(selection, small) if edits else None
        for edit in edits:
            apply_edit(small, edit)
        if edits and self._numbers(selection, small) != before:
            for edit in reversed(edits):
                apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))
            undecided += [f"{edit.module}.{edit.name} = {edit.old}".removeprefix(".") for edit in edits]
            edits = []
        if undecided:
            more = f" and {len(undecided) - _SAID} more" if len(undecided) > _SAID else ""
            warn(
                f"numbers that may say a width and that no run reads keep their value: {', '.join(undecided[:_SAID])}{more}; "
                "set them before calling what reads them",
                WidthWarning,
            )
        return tuple(edits)

    def _numbers(self, selection: Selection, small: nn.Module) -> Any:
        """The numbers that runs show: sizes that differ from what the cut asks for, constants, rates of dropout."""
        try:
            found = check(small, self.runs, self.shapes, selection.choice)
        except MendError as error:
            return str(error)
        return found.notes, found.constants, found.rates

    def _config_edits(self, selection: Selection, small: nn.Module) -> tuple[Edit, ...]:
        if self.config is None or not selection.kept:
            return ()
        found = configure(self.config, small, self.runs, self.shapes, selection.choice)
        if not isinstance(found, str):
            return found
        if selection.request.get("config_expressible"):
            raise unsaid(found)
        warn(
            f"the config of {type(small).__name__} cannot say the new widths ({found}): keep the small model with "
            "surgeon.save(small, folder), or plan with config_expressible=True",
            ConfigWarning,
        )
        return ()
