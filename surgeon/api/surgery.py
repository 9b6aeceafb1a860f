"""Surgery: what surgeon knows of a model, and the stages from there to a plan in order."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from surgeon import criteria
from surgeon.api.sensitivity import Sensitivity, sensitivity
from surgeon.capture.model_state import uncollected
from surgeon.capture.paths.decisions import said
from surgeon.coupling.analysis import Analysis, analyse
from surgeon.coupling.explain import Explanation, FrozenShare, explain, frozen_share
from surgeon.coupling.frozen import FrozenGroup
from surgeon.coupling.groups import Group, Link, reachable
from surgeon.coupling.ignore import Ignored
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solve import Solution
from surgeon.criteria import Criterion
from surgeon.cut.compose import composed
from surgeon.cut.plan import Plan
from surgeon.cut.slice import Kept, shrink_module
from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.graph.queries import check_values
from surgeon.latency.search import timed
from surgeon.mend.config_model import ConfigModel
from surgeon.mend.config_sync import configure, restrict, unsaid
from surgeon.mend.edits import Edit
from surgeon.mend.mend import find_edits
from surgeon.ops.ids import DimIds
from surgeon.report.text import describe
from surgeon.selection.choose import Costs, choose
from surgeon.selection.cost import Choice, ShapeModel, nothing
from surgeon.selection.linked_groups import without_kept_heads
from surgeon.selection.options import Budget, Ratio, Request


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
        self,
        model: nn.Module,
        graph: Graph,
        *further: Graph,
        remarks: Sequence[str] = (),
        unseen: Sequence[str] = (),
    ) -> None:
        self.remarks = tuple(r for r in (graph.assumed, *remarks) if r)
        self.model, self.graph, self.runs = model, graph, (graph, *further)
        if self.without_values:
            self.remarks += (
                "the weights have no values (meta device): a plan says how many channels stay, and takes the first",
            )
        self.analysis: Analysis = analyse(graph, *further)
        self.shapes = ShapeModel(graph, self.propagation, self.solution)
        decisions = itertools.chain.from_iterable(run.decisions for run in self.runs)
        self.unseen = tuple(dict.fromkeys((*unseen, *said(decisions, self._varies))))
        self.remarks += self.unseen

    def _varies(self, node: fx.Node, dim: int) -> bool:
        """Whether a size hangs on the inputs: no tensor of the model's own gives it."""
        ids = self.propagation.axes.get(node, {})
        return isinstance(ids, dict) and dim not in ids and node.op != "get_attr"

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
    def blueprint(self) -> ConfigModel | None:
        """What the model's config can say of its sizes; None if its class is not built from one."""
        return ConfigModel.of(self.model)

    @cached_property
    def macs(self) -> int:
        return self.shapes.macs(nothing(self.solution))

    @cached_property
    def params(self) -> int:
        return self.shapes.params(nothing(self.solution))

    @cached_property
    def size(self) -> int:
        """Bytes of the parameters and stored buffers, tied ones once."""
        return self.shapes.size(nothing(self.solution))

    @cached_property
    def memory(self) -> int:
        """Bytes of the activations that are alive at once, at most, for the example inputs; see
        `ShapeModel.memory`.
        """
        return self.shapes.memory(nothing(self.solution))

    @cached_property
    def frozen_share(self) -> FrozenShare:
        """How many output channels of the model's weights may not leave, its own outputs apart, by reason."""
        return frozen_share(self.analysis)

    def explain(self, name: str) -> Explanation:
        """What a layer is tied to and through which ops, what of it is frozen, why, and what would unfreeze
        it; printable.

        Args:
            name: a module ("layer2.0.conv1"), a tensor ("layer2.0.conv1.weight") or a slot of it
                ("layer2.0.conv1.weight[0]").

        Raises:
            InputError: there is no such thing in the model.
        """
        return explain(self.analysis, name)

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
            options: criterion, round_to (here 1 by default), ... as for `plan`.

        Raises:
            InputError: bad ratios, or a loss without data.
            MissingExtraError: joblib is not installed.
        """
        return sensitivity(self, data, loss=loss, ratios=ratios, n_jobs=n_jobs, **options)

    @uncollected()
    def plan(
        self,
        ratio: Ratio | None = None,
        *,
        macs: Budget | None = None,
        params: Budget | None = None,
        size: Budget | None = None,
        memory: Budget | None = None,
        latency: Budget | None = None,
        runtime: str = "onnxruntime",
        threads: int = 1,
        criterion: str | Criterion = "l1",
        data: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        scope: str | None = None,
        round_to: int | str = "auto",
        heads: str = "both",
        max_ratio: Ratio = 1.0,
        min_channels: int = 1,
        ignore: Iterable[nn.Module | str] = (),
        ignore_inputs: Iterable[nn.Module | str] = (),
        config_expressible: bool = False,
        seed: int = 0,
    ) -> Plan:
        """Choose what leaves; nothing is changed yet.

        Args:
            ratio: share of the channels of every group to remove, in [0, 1). Params and MACs go roughly with
                (1 - ratio)^2, because a layer loses inputs and outputs: 0.5 leaves about a quarter. Or {name
                pattern: ratio}, such as {"*": 0.5, "layer4": 0.2}: the last pattern that matches a layer
                counts, layers that none matches stay.
            macs, params: instead of ratio, what may stay: a share of the original (up to 1, or "50%") or a
                number (above 1, or "1.2G"). Several budgets may be given: all hold, each predicted exactly.
            size: bytes of parameters and stored buffers that may stay: a share, or a text such as "3MB".
            memory: bytes of activations alive at once, at most, for the example inputs: a share, or a text
                such as "20MB".
            latency: of one run on the example inputs, batch included: a share, or a text such as "8ms".
                Kernels are timed on this machine (once: see `latency.LatencyTable`), the candidate is cut and
                measured in turns with the original, the prediction is corrected, and so on until what is
                measured is within 3 % below the target.
            runtime, threads: what the latency is of: "onnxruntime" (fused and exported, on the CPU) or
                "torch" (eager).
            criterion: a name of docs/criteria.md ("l1", "l2", "bn_scale", "lamp", "fpgm", "random", ...; with
                data "taylor", "fisher", "obs", "variance", ...), an object of `surgeon.criteria`, or a
                callable (group, tensors) -> one score per unit, low leaves first. Of weights without values
                (on the meta device) the first channels stay.
            data: batches for criteria that look at data, read once: inputs as the model takes them, in any
                batch size; with a loss, pairs (inputs, targets).
            loss: (output, targets) -> a number, for criteria that need gradients. Without one they use the
                squared norm of the outputs, which needs no labels.
            scope: "uniform" (the same share of every group), "global" (the lowest scores of all groups),
                "isomorphic" (the lowest scores among groups of like structure; Fang et al., Isomorphic
                Pruning, 2024) or "knapsack" (what is worth least for what it costs; needs a budget). By
                default knapsack for budgets, uniform for a ratio.
            round_to: kept widths are multiples of this, where a group has that many channels. "auto" takes
                the block that kernels of the weights' device like (16 on CPUs with AVX-512, 8 on others and
                on GPUs), halved for groups that do not hold two, unless a convolution wants whole ones and no
                budget needs less (warned of); "cpu", "cuda" and "npu" (32) name another target; 1 switches it
                off.
            heads: what attention may lose: "both" (whole heads or dims within heads, whichever meets the
                ratio more closely), "whole", "dims", or "keep" for nothing.
            max_ratio: the largest share that a group may lose, under every scope and budget; or {name
                pattern: share}.
            min_channels: how many channels every group keeps at least.
            ignore: modules, or names of modules or tensors, whose outputs stay.
            ignore_inputs: modules, or names of modules, whose inputs stay.
            config_expressible: remove only what the model's config can say (models of transformers), so that
                `save_pretrained` and `from_pretrained` round-trip: sizes that one number says keep the same
                share, whole heads leave, and what no number says stays.
            seed: for criterion "random".

        Raises:
            InputError: an argument is out of range, unknown, or contradicts another.
            BudgetError: nothing may leave, or a budget lies below what must stay, or no candidate reaches the
                latency.
            PlanError: no config says what is left (with `config_expressible`).
        """
        budgets = {"macs": macs, "params": params, "size": size, "memory": memory, "latency": latency}
        request = Request(
            ratio,
            **budgets,
            scope=scope,
            round_to=round_to,
            heads=heads,
            max_ratio=max_ratio,
            min_channels=min_channels,
        )
        which = criteria.criterion(
            "first" if self.without_values and isinstance(criterion, str) else criterion, seed
        )
        check_values(self.graph)
        groups, links = self.groups_without(ignore, ignore_inputs), self.links
        if config_expressible:
            request = dataclasses.replace(request, heads="whole" if heads == "both" else heads)
            groups, links = self._expressible(groups, request.heads)
        which = criteria.prepare(
            which, seed=seed, model=self.model, graph=self.graph, propagation=self.propagation, solution=self.solution,
            groups=groups, data=data, loss=loss,
        )  # fmt: skip
        block = request.block(
            next((self.graph.tensors[name].device.type for name in self.shapes.parameters), "cpu")
        )
        said = {k: v for k, v in vars(request).items() if v is not None}
        known: dict[str, DimIds] = {}

        def scores(group: Group) -> DimIds:
            if group.name not in known:
                known[group.name] = criteria.scores(which, group, self.graph.tensors)
            return known[group.name]

        def chosen(request: Request, costs: Costs | None = None) -> tuple[Choice, int]:
            return choose(
                groups, scores, self.shapes, request, links, block, costs, getattr(which, "additive", False)
            )

        if latency is None:
            choice, used = chosen(request)
        else:

            def cut(choice: Choice) -> nn.Module:
                return self._cut(self.model, self.shapes.kept(choice), choice)[0]

            (choice, used), said["measured"] = timed(
                self.model, self.shapes, request, chosen, cut, runtime=runtime, threads=threads, block=block
            )
        if isinstance(round_to, str):
            said["block"] = used
        said["criterion"] = (
            criterion
            if isinstance(criterion, str)
            else getattr(criterion, "__name__", type(criterion).__name__)
        )
        if config_expressible:
            said["config_expressible"] = True
        return self._as_plan(choice, said)

    def compose(self, plans: Sequence[Plan]) -> Plan:
        """One plan that leaves what several leave, each made for the model that the one before it left; the
        first for this one.

        For a model that was pruned in steps: with it the last model can be compared with, recovered towards,
        or distilled from the original, and one file says all that left.

        Raises:
            InputError: there is no plan.
            PlanError: a plan does not fit, or they remove what cannot leave this model in one go.
        """
        choice = composed(self.model, self.shapes, plans)
        return self._as_plan(choice, {"composed": [dict(plan.request) for plan in plans]})

    def _expressible(self, groups: list[Group], heads: str) -> tuple[list[Group], list[Link]]:
        """The groups whose sizes the config says, tied where one number says several."""
        if self.blueprint is None:
            raise InputError(
                "config_expressible needs a model whose class builds itself from its config",
                where=type(self.model).__name__,
                why="type(model)(model.config) does not give this architecture",
                fix="leave config_expressible out, and keep the small model with surgeon.save(small, folder)",
            )
        more, without = restrict(
            self.blueprint, without_kept_heads(groups, heads, self.links), self.graph.aliases
        )
        links = [*self.links, *more]
        without |= {g.name for g in self.groups} - {g.name for g in groups}
        without = reachable(without, links)
        return [g for g in groups if g.name not in without], links

    def _as_plan(self, choice: Choice, request: dict[str, Any]) -> Plan:
        if self.graph.named:
            request = request | {"outputs": list(self.graph.named)}
        return Plan(
            kept=self.shapes.kept(choice),
            hash=self.graph.hash,
            macs=self.shapes.macs(choice),
            params=self.shapes.params(choice),
            size=self.shapes.size(choice),
            memory=self.shapes.memory(choice),
            macs_before=self.macs,
            params_before=self.params,
            request=request,
            _finish=lambda plan, model: self._finish(plan, model, choice),
        )

    def _cut(self, model: nn.Module, kept: Kept, choice: Choice) -> tuple[nn.Module, tuple[Edit, ...]]:
        small = shrink_module(model, kept)
        return small, find_edits(small, self.runs, self.shapes, choice)

    @uncollected()
    def _finish(self, plan: Plan, model: nn.Module | None, choice: Choice) -> tuple[nn.Module, Plan]:
        """Apply a plan whose edits are not known yet, and find them on the way."""
        small, edits = self._cut(self.model if model is None else model, plan.kept, choice)
        if plan.kept and self.blueprint is not None:
            found = configure(self.blueprint, small, self.runs, self.shapes, choice)
            if isinstance(found, str):
                if plan.request.get("config_expressible"):
                    raise unsaid(found)
                warnings.warn(
                    f"the config of {type(small).__name__} cannot say the new widths ({found}): keep the small model with "
                    "surgeon.save(small, folder), or plan with config_expressible=True",
                    stacklevel=2,
                )
                found = ()
            edits += found
        object.__setattr__(plan, "edits", edits)  # the one late field of a frozen plan
        return small, plan

    def groups_without(
        self, ignore: Iterable[nn.Module | str], ignore_inputs: Iterable[nn.Module | str] = ()
    ) -> list[Group]:
        """The groups less the units that the outputs (or inputs) of ignored modules hold."""
        held = Ignored(self.model, self.graph, self.propagation, self.solution)
        return held.groups_left(self.groups, self.links, held.units(ignore, ignore_inputs))

    def __str__(self) -> str:
        return describe(self.model, self.analysis, self.shapes, self.remarks)
