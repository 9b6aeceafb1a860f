"""What holds of the ids of every value, whichever op gave it. The framework keeps it, so that no rule has to.

- *Fit*: ids are given for dims that the value has, one id for each entry along their own dim, and with size 1 or
  the value's size along every other dim. A rule that breaks this is refused by name.
- *Mixing joins*: an op that sums, orders, normalises or looks through a window along a dim mixes the entries
  there, so the ids of no other dim vary along it (`joined_along`, before the rule runs).
- *What stays is rectangular*: where the ids of one dim vary along others (its rows), every row loses equally
  many. Two dims whose ids vary along each other could not be rectangular: the outer one's are joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from surgeon.errors import RuleError
from surgeon.graph.graph import Spec
from surgeon.graph.messages import where
from surgeon.ops.ids import Constraints, DimIds, ValueIds, varies


def joined_along(constraints: Constraints, axes: ValueIds, mixed: Iterable[int]) -> ValueIds:
    """The ids of a value whose entries an op mixes along some dims: those of all other dims are joined across."""
    mixed = set(mixed)
    result: ValueIds = {}
    for dim, ids in axes.items():
        for other in mixed if dim not in mixed else ():
            ids = constraints.collapse(ids, other)
        result[dim] = ids
    return result


def settled(node: fx.Node, result: Any, constraints: Constraints) -> Any:
    """The ids that a rule gave, checked, with the facts written down that keep what stays rectangular.

    Raises:
        RuleError: the ids do not fit the op's result.
    """
    specs = node.meta["spec"]
    if isinstance(result, tuple) != isinstance(specs, tuple) or (
        isinstance(result, tuple) and len(result) != len(specs)
    ):
        raise _refusal(node, f"{_count(result)} sets of ids for {_count(specs)} results")
    if not isinstance(result, tuple):
        return _settled_value(node, result, specs, constraints)
    return tuple(
        _settled_value(node, axes, spec, constraints) for axes, spec in zip(result, specs, strict=True)
    )


def _count(item: Any) -> int:
    return len(item) if isinstance(item, tuple) else 1


def _settled_value(node: fx.Node, axes: ValueIds, spec: Spec | None, constraints: Constraints) -> ValueIds:
    shape = spec.shape if spec is not None else ()
    for dim, ids in axes.items():
        if not _fits(dim, ids, shape):
            raise _refusal(node, f"ids of shape {ids.shape} for dim {dim} of a result of shape {shape}")
    axes = acyclic(constraints, axes)
    for dim, ids in axes.items():
        constraints.even(ids, dim)
    return axes


def _fits(dim: int, ids: DimIds, shape: tuple[int, ...]) -> bool:
    """Whether ids cover their own dim, and each other dim of the value once or entry by entry."""
    return (
        0 <= dim < len(shape)
        and ids.ndim == len(shape)
        and ids.shape[dim] == shape[dim]
        and (
            0 < ids.size == shape[dim]  # of size 1 along all others
            or all(own in (1, size) for own, size in zip(ids.shape, shape, strict=True))
        )
    )


def acyclic(constraints: Constraints, axes: ValueIds) -> ValueIds:
    """Join ids of the outer dims until no two dims' ids vary along each other, directly or through further dims."""
    if all(ids.size == ids.shape[dim] for dim, ids in axes.items()):
        return axes
    axes = dict(axes)
    done: set[int] = set()  # dims whose ids vary along such dims only
    while len(done) < len(axes):
        rest = [d for d in sorted(axes) if d not in done]
        free = [d for d in rest if not any(_along(axes[d], o) for o in rest if o != d)]
        if not free:  # a cycle: the outermost of its dims gives way
            for other in rest[1:]:
                axes[rest[0]] = constraints.collapse(axes[rest[0]], other)
            free = rest[:1]
        done.update(free)
    return axes


def _along(ids: DimIds, dim: int) -> bool:
    return ids.shape[dim] > 1 and varies(ids, dim)


def _refusal(node: fx.Node, why: str) -> RuleError:
    return RuleError(
        f"the rule of op {node.target} gives ids that do not fit its result", where=where(node), why=why,
        fix="mend the rule (docs/adding-an-op.md); an op without a rule freezes what it touches",
    )  # fmt: skip
