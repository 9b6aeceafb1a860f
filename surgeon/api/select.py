"""select(found, request) -> Selection: the stages from scores to what leaves, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from surgeon import criteria
from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link, reachable
from surgeon.criteria.combine import Criterion
from surgeon.cut.cut import Cutter
from surgeon.cut.inspected import Inspected
from surgeon.errors import InputError, NothingRemovedWarning, warn
from surgeon.graph.queries import check_values
from surgeon.mend.config_model import ConfigModel
from surgeon.mend.config_sync import restrict
from surgeon.ops.ids import DimIds
from surgeon.selection.budgets import Costs
from surgeon.selection.choose import choose
from surgeon.selection.cost import Choice
from surgeon.selection.linked_groups import without_kept_heads
from surgeon.selection.request import Request
from surgeon.selection.selection import Selection
from surgeon.selection.shares import missed


def select(found: Inspected, request: Request, more: Sequence[Link] = ()) -> Selection:
    """What leaves an inspected model.

    Args:
        more: pairs of groups that keep the same share, beside those that are known.

    Raises:
        InputError, BudgetError: see `Surgery.plan`.
    """
    criterion = _criterion(found, request)
    check_values(found.graph)
    groups, links = (
        found.groups_without(request.options["ignore"], request.options["ignore_inputs"]),
        found.links,
    )
    if request.options["config_expressible"]:
        if request.options["heads"] == "both":
            request = request.but(heads="whole")
        groups, links = expressible(found, groups, request.options["heads"])
    links = [*links, *more]
    criterion = _informed(criterion, found, groups, request)
    block = request.block(_device(found))
    scores = _scores(criterion, found)
    additive = getattr(criterion, "additive", False)

    def chosen(request: Request, costs: Costs | None = None) -> tuple[Choice, int]:
        return choose(groups, scores, found.shapes, request, links, block, costs, additive)

    said = request.said
    if request.options["latency"] is None:
        choice, used = chosen(request)
    else:
        from surgeon.api.reach_latency import reach  # it takes in the exporter and the benchmarks

        (choice, used), said["measured"] = reach(found, request, chosen, _cut(found), block)
    if isinstance(request.options["round_to"], str):
        said["block"] = used
    others = missed(groups, links, request, choice)
    if others:
        said["missed"] = others
    if not choice.any():
        warn(_nothing(request), NothingRemovedWarning)
    return Selection.of(found.shapes, choice, found.cost, said)


def _nothing(request: Request) -> str:
    """Why a request removes nothing, and what to do."""
    if request.budgets:
        named = " and ".join(f"{name}={value}" for name, value in request.budgets.items())
        return f"nothing leaves: the model is within {named} as it is; a budget says what may stay, 0.5 or '50%' for half"
    asked = "each of the ratios" if isinstance(request.ratio, Mapping) else f"ratio={request.ratio}"
    cap, least = request.options["max_ratio"], request.options["min_channels"]
    if cap in (0, 0.0):
        return f"nothing leaves: max_ratio={cap} lets nothing leave; pass a larger one"
    if least > 1:
        return (
            f"nothing leaves: min_channels={least} keeps every group as it is, or {asked} is less than half a "
            "step of it; pass a smaller min_channels, or a larger ratio"
        )
    return (
        f"nothing leaves: {asked} is less than half a step of every group; pass a larger ratio, or round_to=1 "
        "if blocks of channels are the reason"
    )


def expressible(found: Inspected, groups: list[Group], heads: str) -> tuple[list[Group], list[Link]]:
    """The groups whose sizes the model's config says, tied where one number says several.

    Raises:
        InputError: no config says the sizes of this model.
    """
    config: ConfigModel | None = found.config
    if config is None:
        raise InputError(
            "config_expressible needs a model whose class builds itself from its config",
            where=type(found.model).__name__,
            why="type(model)(model.config) does not give this architecture",
            fix="leave config_expressible out, and keep the small model with surgeon.save(small, folder)",
        )
    more, without = restrict(config, without_kept_heads(groups, heads, found.links), found.graph.aliases)
    links = [*found.links, *more]
    without |= {g.name for g in found.groups} - {g.name for g in groups}
    without = reachable(without, links)
    return [g for g in groups if g.name not in without], links


def _criterion(found: Inspected, request: Request) -> Criterion:
    """Weights without values have no scores: their first channels stay."""
    asked = request.options["criterion"]
    named = "first" if found.without_values and isinstance(asked, str) else asked
    return criteria.criterion(named, request.options["seed"])


def _informed(criterion: Criterion, found: Inspected, groups: list[Group], request: Request) -> Criterion:
    return criteria.prepare(
        criterion,
        seed=request.options["seed"],
        model=found.model,
        graph=found.graph,
        propagation=found.propagation,
        solution=found.solution,
        groups=groups,
        data=request.options["data"],
        loss=request.options["loss"],
    )


def _scores(criterion: Criterion, found: Inspected) -> Callable[[Group], DimIds]:
    """Scores of groups, each asked for once."""
    known: dict[str, DimIds] = {}

    def scores(group: Group) -> DimIds:
        if group.name not in known:
            known[group.name] = criteria.scores(criterion, group, found.graph.tensors)
        return known[group.name]

    return scores


def _cut(found: Inspected) -> Callable[[Choice], nn.Module]:
    """Small models of choices, to be measured."""
    cutter = Cutter(found.model, found.runs, found.shapes)
    return lambda choice: cutter.cut(Selection.of(found.shapes, choice, found.cost, {}))[0]


def _device(found: Inspected) -> str:
    """The type of device that holds the weights."""
    return next((found.graph.tensors[name].device.type for name in found.shapes.parameters), "cpu")
