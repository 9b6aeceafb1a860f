"""One op of a recorded graph as its rule sees it, and how the ids of operands meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Spec, spec
from surgeon.ops.ids import Constraints, ValueIds
from surgeon.ops.invariants import joined_along
from surgeon.ops.table import Family, defaults, info, op_name


class OpContext:
    """One op in the graph, as its rule sees it."""

    def __init__(self, node: fx.Node, axes: Mapping[fx.Node, Any], constraints: Constraints) -> None:
        self.node, self._axes, self.constraints = node, axes, constraints
        self.arguments = arguments(node)
        self._joined: dict[fx.Node, ValueIds] = {}

    def __getitem__(self, name: str) -> Any:
        """The value of an argument by its name in the op's schema, `dim` or `attn_bias|attn_mask`."""
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """The same; None if the schema has no such argument."""
        return self.arguments.get(name)

    def axes(self, arg: Any) -> ValueIds:
        """The ids of an argument's dims; none for a scalar or None.

        Those of an operand whose entries the op mixes along some dims (see `OpInfo.mixes`) do not vary along them.
        """
        if not isinstance(arg, fx.Node):
            return {}
        axes: ValueIds = self._axes.get(arg, {})
        if arg not in self.mixed or not isinstance(axes, dict):
            return axes
        if arg not in self._joined:
            self._joined[arg] = joined_along(self.constraints, axes, self.mixed[arg])
        return self._joined[arg]

    @cached_property
    def mixed(self) -> dict[fx.Node, set[int]]:
        """Operand -> the dims that the op sums, orders, normalises or looks through a window along."""
        found: dict[fx.Node, set[int]] = {}
        declared = info(self.node).mixes
        for name, dims in declared(self).items() if declared else ():
            operand = self.get(name)
            if isinstance(operand, fx.Node):
                ndim = max(1, len(self.shape(operand)))
                found.setdefault(operand, set()).update(int(d) % ndim for d in dims)
        return found

    def shape(self, arg: Any) -> tuple[int, ...]:
        if not isinstance(arg, fx.Node):
            return ()
        found: Spec = arg.meta["spec"]
        return found.shape

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the (first) output."""
        return spec(self.node).shape

    @property
    def tensors(self) -> list[fx.Node]:
        """All tensor arguments, also those in lists."""
        return list(self.node.all_input_nodes)

    def freeze(self, axes: ValueIds, dims: Any, reason: str) -> ValueIds:
        """Freeze the ids of `dims` and return what is left."""
        dims = set(dims)
        for dim in dims & set(axes):
            self.constraints.freeze(axes[dim], reason)
        return {d: t for d, t in axes.items() if d not in dims}


def along(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    """Mixes along the argument `dim`: one dim, several, or all of them if none is given."""
    dims = ctx.get("dim")
    if isinstance(dims, int):
        return {"self": [dims]}
    return {"self": dims or range(len(ctx.shape(ctx["self"])))}


def opaque(ctx: OpContext) -> Any:
    """An op without a rule: nothing that it touches may leave."""
    reason = f"op {op_name(ctx.node)} has no rule"
    for tensor in ctx.tensors:
        axes = ctx.axes(tensor)
        for part in axes if isinstance(axes, tuple) else (axes,):
            ctx.constraints.freeze_all(part, reason)
    spec = ctx.node.meta["spec"]
    return tuple({} for _ in spec) if isinstance(spec, tuple) else {}


def shift(axes: ValueIds, ndim: int, to: int) -> ValueIds:
    """The same ids in a value with more dims on the left, as broadcasting aligns them."""
    extra = to - ndim
    if extra == 0:
        return axes
    return {d + extra: t.reshape((1,) * extra + t.shape) for d, t in axes.items()}


def broadcast(
    ctx: OpContext, operands: list[tuple[ValueIds, tuple[int, ...]]], out: tuple[int, ...]
) -> ValueIds:
    """Entries of all operands meet: join the ids of each dim; a dim that is fixed in one operand freezes
    the others.
    """
    ndim = len(out)
    aligned = [
        (shift(axes, len(shape), ndim), (1,) * (ndim - len(shape)) + tuple(shape)) for axes, shape in operands
    ]
    result: ValueIds = {}
    for dim in {d for axes, _ in aligned for d in axes}:
        operand_ids = [axes[dim] for axes, _ in aligned if dim in axes]
        if any(dim not in axes and shape[dim] != 1 for axes, shape in aligned):
            for dim_ids in operand_ids:
                ctx.constraints.freeze(dim_ids, "meets a tensor whose size here is fixed")
            continue
        result[dim] = meet(ctx.constraints, operand_ids)
    return result


def meet(constraints: Constraints, operand_ids: list[np.ndarray]) -> np.ndarray:
    """Join ids that meet entry by entry; the most compressed one stands for all, and one of a tensor
    for an unowned one.
    """
    best = min(operand_ids, key=lambda t: t.size)
    for dim_ids in operand_ids:
        if dim_ids is not best:
            constraints.join(dim_ids, best)
    free = constraints.is_unowned(best)
    for dim_ids in operand_ids:
        if free.any() and dim_ids is not best:
            best = np.where(free, dim_ids, best)
            free = constraints.is_unowned(best)
    return best


def beside(constraints: Constraints, operand_ids: list[np.ndarray]) -> np.ndarray:
    """Join ids of values that lie side by side; as the entries do not mix, an unowned one stands
    for all.
    """
    best = meet(constraints, operand_ids)
    if any(constraints.is_unowned(dim_ids).any() for dim_ids in operand_ids):
        found: np.ndarray = constraints.collapse(np.stack(np.broadcast_arrays(*operand_ids)), 0)[0]
        for dim in range(found.ndim):
            found = constraints.collapse(found, dim) if best.shape[dim] == 1 else found
        return found
    return best


defaults(Family.OPAQUE, ids=opaque)
