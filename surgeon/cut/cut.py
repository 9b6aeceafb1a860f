"""Selection -> (small module, Plan): slice, then find which numbers in the model's code must change.

A plan needs no small module of its own: what the code needs changed is found on a rough copy, which has the
small module's shapes and any of the model's values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from surgeon.cut.plan import Plan, carrying
from surgeon.cut.pretrained import CONFIG_SAYS
from surgeon.cut.slice import Slicer, rough_slice, shrink_module
from surgeon.errors import ConfigWarning, WidthWarning, warn
from surgeon.graph.graph import Graph
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
        mended = find_edits(
            small, self.runs, self.shapes, selection.choice, lambda: self._unread(selection, small)
        )
        _warn_of(mended.undecided)
        rescaled = {"rescaled": [str(number) for number in mended.rescaled]} if mended.rescaled else {}
        config_edits, said = self._config_edits(selection, small)
        return Plan(
            kept=selection.kept,
            hash=self.runs[0].hash,
            macs=selection.cost.macs,
            params=selection.cost.params,
            size=selection.cost.size,
            memory=selection.cost.memory,
            macs_before=selection.before.macs,
            params_before=selection.before.params,
            edits=(*mended.edits, *mended.unread, *config_edits),
            request={**selection.request, **rescaled, **({CONFIG_SAYS: True} if said else {})},
        )

    def _unread(self, selection: Selection, small: nn.Module) -> tuple[list[Edit], list[str]]:
        """Edits of numbers that say widths and that no run reads, and those that may say one."""
        return follow_widths(small, self.model, self.runs[0]) if selection.kept else ([], [])

    def _config_edits(self, selection: Selection, small: nn.Module) -> tuple[tuple[Edit, ...], bool]:
        """Edits of the config, and whether it says the widths that are left."""
        if self.config is None or not selection.kept:
            return (), False
        found = configure(self.config, small, self.runs, self.shapes, selection.choice)
        if not isinstance(found, str):
            return found, True
        if selection.request.get("config_expressible"):
            raise unsaid(found)
        name = type(small).__name__
        warn(
            f"the config of {name} cannot say the new widths ({found}): surgeon.save(small, folder) and "
            "small.save_pretrained(folder) keep the plan beside the weights, and surgeon.load(folder, factory) reads it "
            f"({name}.from_pretrained would build the widths of the original); or plan with config_expressible=True",
            ConfigWarning,
        )
        return (), False


def _warn_of(undecided: Sequence[str]) -> None:
    if undecided:
        more = f" and {len(undecided) - _SAID} more" if len(undecided) > _SAID else ""
        warn(
            f"numbers that may say a width and that no run reads keep their value: {', '.join(undecided[:_SAID])}{more}; "
            "set them before calling what reads them",
            WidthWarning,
        )
