"""choose(...) -> (Choice, block): which units leave, from scores and a ratio or budgets.

Scopes: `uniform` removes the same share of all linked groups (see `linked_groups`); `global` removes the lowest scores
wherever they are; `isomorphic` does so among groups of like structure; `knapsack` weighs importance against
cost (see there). A budget is met from below: the ratio is searched at which all budgets just hold, then
whatever still fits is given back, the highest scores first, until no linked groups can take one step more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from surgeon.coupling.frozen import find_frozen
from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.errors import BudgetError, InputError
from surgeon.graph.messages import where
from surgeon.ops.ids import DimIds
from surgeon.selection.amounts import matches
from surgeon.selection.budgets import Budgets, Costs
from surgeon.selection.cost import Choice, ShapeModel
from surgeon.selection.linked_groups import without_kept_heads
from surgeon.selection.planner import Planner
from surgeon.selection.request import Request

_SAID = 3  # frozen tensors that an error names


def choose(
    groups: list[Group],
    scores: Callable[[Group], DimIds],
    shapes: ShapeModel,
    request: Request,
    links: Iterable[Link] = (),
    block: int = 1,
    costs: Costs | None = None,
    additive: bool = False,
) -> tuple[Choice, int]:
    """The choice that meets the request, and the block that its widths are multiples of.

    Args:
        scores: [sets, steps] of a group, low leaves first.
        links: pairs of groups that keep the same share.
        block: kept widths are multiples of it; of less under "auto" if a budget cannot be met otherwise,
            which is warned of.
        costs: what budgets are counted in, by name; those of `shapes` if left out.
        additive: whether scores add up over groups to what is lost.

    Raises:
        BudgetError: there is nothing to remove, or a budget lies below what must stay.
        InputError: a pattern of the request matches no group.
    """
    links = list(links)
    _check_patterns(request, groups)
    groups = without_kept_heads(groups, request.options["heads"], links)
    if not groups:
        raise BudgetError(
            "the model has no group of channels that may leave",
            where=_frozen(shapes),
            why="everything that was found is frozen",
            fix="print(surgeon.inspect(model)) names each frozen tensor and the reason",
        )
    planner = Planner(groups, scores, shapes, request, links, block, additive)
    if request.ratio is not None:
        return planner.choice(
            planner.at(request.ratio if isinstance(request.ratio, int | float) else 0.5)
        ), block
    known = costs or {kind: getattr(shapes, kind) for kind in request.budgets}
    return Budgets(planner).within({kind: known[kind] for kind in request.budgets}), planner.block


def _frozen(shapes: ShapeModel) -> str:
    """What is frozen, the most channels first: the tensor, why, the op and the line."""
    found = [item for item in find_frozen(shapes.propagation, shapes.solution) if item.node is not None]
    said = []
    for item in sorted(found, key=lambda item: -item.count)[:_SAID]:
        tensor, dim = item.slots[0]
        assert item.node is not None
        said.append(f"{tensor}[{dim}] {item.reason} ({where(item.node)})")
    return "; ".join(said)


def _check_patterns(request: Request, groups: list[Group]) -> None:
    names = {member.tensor for group in groups for member in group.members}
    for name, value in (("ratio", request.ratio), ("max_ratio", request.options["max_ratio"])):
        for pattern in value if isinstance(value, Mapping) else ():
            if not any(matches(pattern, tensor) for tensor in names):
                raise InputError(
                    f"{name} names {pattern!r}, which matches no layer that may lose channels",
                    fix="use names as in model.named_modules(), with * for any part",
                )
    if isinstance(request.ratio, Mapping) and request.scope != "uniform":
        raise InputError(
            f"ratios by name and scope {request.scope!r} contradict each other",
            fix="leave scope out, or pass one ratio and caps by name: max_ratio={...}",
        )
