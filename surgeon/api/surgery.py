"""Surgery: what surgeon knows of a model, and the stages from there to a plan in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypeVar, Unpack

from torch import Tensor, nn

from surgeon.api.select import select
from surgeon.api.sensitivity import Sensitivity, sensitivity
from surgeon.capture.model_state import at_work
from surgeon.coupling.analysis import Analysis
from surgeon.coupling.explain import Explanation, explain
from surgeon.coupling.frozen import FrozenGroup
from surgeon.coupling.frozen_share import FrozenShare, frozen_share
from surgeon.coupling.groups import Group
from surgeon.coupling.ignore import Ignored, path_of
from surgeon.coupling.links import Link
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.cut.compose import composed
from surgeon.cut.cut import Cutter
from surgeon.cut.plan import PLAN, Plan
from surgeon.errors import MendError
from surgeon.graph.given import check_given
from surgeon.graph.graph import Graph
from surgeon.mend.config_model import ConfigModel
from surgeon.report.text import count, describe
from surgeon.selection.cost import ShapeModel
from surgeon.selection.options import PlanOptions, Ratio, takes_options
from surgeon.selection.request import Request
from surgeon.selection.selection import Cost, Selection

Made = TypeVar("Made")
_LINKED = 4  # times that groups are linked


class Surgery:
    """What surgeon knows of a model: printable, and the place to make plans. Made by `inspect`.

    Attributes:
        model: the model, untouched.
        graph: its recorded run.
        groups: units that may leave, by group.
        macs, params: of the model as it is; MACs for the example inputs, batch included.
        runs: all recorded runs; those after the first one take other paths through the model's code.
        remarks: what was assumed, and what the runs did not see.
        unseen: those of them that name paths through the model's code that no run took: where Python decided by a
            value, a size or a mode, the line and the way that it went.
    """

    def __init__(
        self, model: nn.Module, analysis: Analysis, remarks: Sequence[str] = (), unseen: Sequence[str] = ()
    ) -> None:
        self.model, self.analysis = model, analysis
        self.remarks, self.unseen = tuple(remarks), tuple(unseen)

    @property
    def runs(self) -> tuple[Graph, ...]:
        """All recorded runs, the one that a user will repeat first."""
        return self.analysis.runs

    @property
    def graph(self) -> Graph:
        return self.analysis.graph

    @cached_property
    def shapes(self) -> ShapeModel:
        """The exact cost of any choice."""
        return ShapeModel(self.graph, self.propagation, self.solution)

    @property
    def propagation(self) -> Propagation:
        """The ids of every value, and the facts about them."""
        return self.analysis.propagation

    @property
    def solution(self) -> Solution:
        """What follows from the facts about ids."""
        return self.analysis.solution

    @property
    def groups(self) -> list[Group]:
        """What may be removed, by group."""
        return list(self.analysis.groups)

    @property
    def links(self) -> list[Link]:
        """Pairs of groups that must keep the same share."""
        return list(self.analysis.links)

    @property
    def frozen(self) -> list[FrozenGroup]:
        """What may not be removed, with reasons."""
        return list(self.analysis.frozen)

    @cached_property
    def without_values(self) -> bool:
        """Whether weights are on the meta device: sizes can be planned, but no channel is better than
        another.
        """
        return any(self.graph.tensors[name].is_meta for name in self.graph.owned)

    @cached_property
    def config(self) -> ConfigModel | None:
        """What the model's config can say of its sizes; None if its class is not built from one."""
        return ConfigModel.of(self.model)

    @cached_property
    def cost(self) -> Cost:
        """What the model costs as it is."""
        return Cost(*self.shapes.before())

    @property
    def macs(self) -> int:
        return self.cost.macs

    @property
    def params(self) -> int:
        return self.cost.params

    @property
    def size(self) -> int:
        """Bytes of the parameters and stored buffers, tied ones once."""
        return self.cost.size

    @property
    def memory(self) -> int:
        """Bytes of the activations that are alive at once, at most, for the example inputs; see
        `ShapeModel.memory`.
        """
        return self.cost.memory

    @cached_property
    def frozen_share(self) -> FrozenShare:
        """How many output channels of the model's weights may not leave, its own outputs apart, by reason."""
        return frozen_share(self.analysis)

    def explain(self, name: str | nn.Module) -> Explanation:
        """What a layer is tied to and through which ops, what of it is frozen, why, and what would unfreeze
        it; printable.

        Args:
            name: a module or its name ("layer2.0.conv1"), a tensor ("layer2.0.conv1.weight") or a slot of it
                ("layer2.0.conv1.weight[0]").

        Raises:
            InputError: there is no such thing in the model.
        """
        return explain(self.analysis, name if isinstance(name, str) else path_of(self.model, name))

    def sensitivity(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        ratios: Sequence[float] = (0.25, 0.5, 0.75),
        n_jobs: int | None = None,
        **options: Any,
    ) -> Sensitivity:
        """How much the outputs (or a loss) change when one group alone loses channels, for each group at
        several ratios.

        Args:
            data: batches as the model takes them; with a loss, pairs (inputs, targets). None: the example
                inputs.
            loss: (output, targets) -> a number; the change is then its rise, else the relative change of the
                outputs.
            ratios: shares of a group's channels, in (0, 1).
            n_jobs: processes, through joblib: a registered dask or ray backend spreads them over machines.
            options: as for `plan`; round_to is 1 by default here.

        Raises:
            InputError: bad ratios, or a loss without data.
            MissingExtraError: joblib is not installed.
        """
        return sensitivity(self, data, loss=loss, ratios=ratios, n_jobs=n_jobs, **options)

    @takes_options
    @at_work()
    def select(self, ratio: Ratio | None = None, **options: Unpack[PlanOptions]) -> Selection:
        """What leaves, as plain data; the model's code is not looked at yet.

        Args:
            ratio: see `plan`.

        Raises:
            InputError, BudgetError: see `plan`.
        """
        return select(self, Request.of(ratio, **options))

    @takes_options
    @at_work()
    def plan(self, ratio: Ratio | None = None, **options: Unpack[PlanOptions]) -> Plan:
        """Choose what leaves, and find what the model's code needs changed; nothing is changed yet.

        Args:
            ratio: share of the channels of every group to remove, in [0, 1). Params and MACs go roughly with
                (1 - ratio)^2, because a layer loses inputs and outputs: 0.5 leaves about a quarter. Or {name
                pattern: ratio}, such as {"*": 0.5, "layer4": 0.2}: the last pattern that matches a layer
                counts, layers that none matches stay.

        Raises:
            InputError: an argument is out of range, unknown, or contradicts another.
            BudgetError: nothing may leave, or a budget lies below what must stay, or no candidate reaches the
                latency.
            MendError: the model's code holds a size that cannot be changed.
            PlanError: no config says what is left (with `config_expressible`).
        """
        request = Request.of(ratio, **options)
        return self._linking(self._cutter.plan, lambda links: select(self, request, links))

    @takes_options
    @at_work()
    def cut(self, ratio: Ratio | None = None, **options: Unpack[PlanOptions]) -> tuple[nn.Module, Plan]:
        """The small model and its plan: the same as `plan` and `Plan.apply`, with one copy less.

        Args:
            ratio: see `plan`.

        Raises:
            InputError, BudgetError, MendError, PlanError: see `plan`.
        """
        request = Request.of(ratio, **options)
        return self._linking(self._cutter.cut, lambda links: select(self, request, links))

    def cut_chosen(self, chosen: Callable[[list[Link]], Selection]) -> tuple[nn.Module, Plan]:
        """As `cut`, of what is chosen in another way.

        Args:
            chosen: pairs of groups that keep the same share, beside those that are known -> what stays.

        Raises:
            MendError: the model's code holds a size that cannot be changed.
        """
        return self._linking(self._cutter.cut, chosen)

    def _linking(self, make: Callable[[Selection], Made], chosen: Callable[[list[Link]], Selection]) -> Made:
        """What is made of a selection. Where one number of the code serves several groups that would get unequal shares, they
        are linked, and the selection is made anew.

        Raises:
            MendError: no links help.
        """
        links: list[Link] = []
        for number in range(_LINKED):
            try:
                return make(chosen(links))
            except MendError as error:
                known = {frozenset(link) for link in (*self.links, *links)}
                ties = (*error.ties[number:], *error.ties)  # more of them each time
                new = ([link for link in tied if frozenset(link) not in known] for tied in ties)
                more = next(filter(None, new), None)
                if not more:
                    raise
                links += more
        return make(chosen(links))

    def compose(self, plans: Sequence[Plan]) -> Plan:
        """One plan that leaves what several leave, each made for the model that the one before it left; the
        first for this one.

        For a model that was pruned in steps: with it the last model can be compared with, recovered towards,
        or distilled from the original, and one file says all that left.

        Raises:
            InputError: there is no plan.
            PlanError: a plan does not fit, or they remove what cannot leave this model in one go.
        """
        several = list(plans) if isinstance(plans, Iterable) else [plans]
        for plan in several:
            check_given("surgery.compose([plan, ...])", plan=(plan, PLAN))
        choice = composed(self.model, self.shapes, several)
        said = {"composed": [dict(plan.request) for plan in several]}
        return self._cutter.plan(Selection.of(self.shapes, choice, self.cost, said))

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.model, self.runs, self.shapes, self.config)

    def groups_without(
        self, ignore: Iterable[nn.Module | str], ignore_inputs: Iterable[nn.Module | str] = ()
    ) -> list[Group]:
        """The groups less the units that the outputs (or inputs) of ignored modules hold."""
        held = Ignored(self.model, self.graph, self.propagation, self.solution)
        return held.groups_left(self.groups, self.links, held.units(ignore, ignore_inputs))

    def __repr__(self) -> str:
        frozen = sum(len(item.slots) for item in self.frozen)
        return (
            f"<Surgery of {type(self.model).__name__}: {len(self.groups)} groups of channels may leave, {frozen} dims are "
            f"frozen; {count(self.params)} params, {count(self.macs)} MACs. print() says all; .plan(0.5) makes a plan>"
        )

    def __str__(self) -> str:
        return describe(self.model, self.analysis, self.shapes, self.remarks)
