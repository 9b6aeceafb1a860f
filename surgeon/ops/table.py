"""The registry of rules and the view of the graph that a rule gets."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from surgeon.graph.arguments import Arguments, arguments
from surgeon.graph.graph import Spec, spec
from surgeon.ops.ids import Constraints, ValueIds
from surgeon.ops.invariants import joined_along
from surgeon.ops.letters import Product, bind


class Family(enum.Enum):
    """What an op does to channels; every op that surgeon knows belongs to one family."""

    MOVEMENT = "movement"  # the same entries in other places: ids move along
    ELEMENTWISE = "elementwise"  # entries of several operands meet: their ids are joined
    CONTRACTION = "contraction"  # a dim of two operands is summed over: its ids are joined and end
    REDUCTION = "reduction"  # a dim of one operand ends, or its entries are normalised by each other
    FACTORY = "factory"  # a tensor made of constants: its dims follow whatever they meet
    OPAQUE = "opaque"  # anything else: freezes what it touches


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
        """Freeze the tracks of `dims` and return what is left."""
        dims = set(dims)
        for dim in dims & set(axes):
            self.constraints.freeze(axes[dim], reason)
        return {d: t for d, t in axes.items() if d not in dims}


Rule = Callable[[OpContext], Any]
Mixes = Callable[[OpContext], Mapping[str, Iterable[int]]]  # name of an operand -> dims
Absent = Callable[[Any], Any]  # a MaskedOp -> (data, mask), or a list of them
Letters = str | Callable[[Arguments], str]


class Trait(enum.Enum):
    """What else the stages ask of an op."""

    ATTENTION = "softmax(q k^T) v in one op"
    SCORES = "a batched product that may be one of queries with keys, or of their softmax with values"
    BATCH_NORM = "each channel is scaled and shifted by vectors"
    SATURATES = "an activation that gives zero for many inputs"
    COPIES = "gives what it was given: computes nothing"
    RESHAPES = "the same entries in the same order"
    PERMUTES = "the same entries, dims in another order"


@dataclasses.dataclass(frozen=True)
class OpInfo:
    """All that is known of one op.

    Attributes:
        ids: the rule: what it does to channel ids. None: that of its family.
        absent: what it computes when entries are gone; None: as its family. It may not use ids: the proof is computed with
            it.
        letters: of a product (see `letters`), perhaps by its arguments.
        mixes: the dims of operands that the op sums, orders, normalises or looks through a window along. Mixing joins
            what the other dims hold there, so the framework joins their ids across it before the rule runs.
        alike: a name for all ops that differ by how tensors lie in memory alone.
        row_bytes: rows of its weight must be multiples of so many bytes.
        in_float64: computes the same where the op has no kernel for float64.
    """

    family: Family
    letters: Letters | None = None
    ids: Rule | None = None
    absent: Absent | None = None
    mixes: Mixes | None = None
    traits: Collection[Trait] = ()
    alike: str = ""
    row_bytes: int = 1
    in_float64: Callable[..., Any] | None = None


_OPS: dict[str, OpInfo] = {}
_IDS: dict[Family, Rule] = {}
_ABSENT: dict[Family, Absent] = {}


def op(names: str, family: Family, letters: Letters | None = None, **known: Any) -> None:
    """Declare ops, all their overloads: names of ATen, or `library::name`, separated by spaces.

    Args:
        known: further attributes of `OpInfo`.

    Raises:
        ValueError: an op is declared twice, or is a reduction that does not say along which dims it mixes.
    """
    if family is Family.REDUCTION and known.get("mixes") is None:
        raise ValueError(f"along which dims do {names} mix?")
    for name in names.split():
        if name in _OPS:
            raise ValueError(f"op {name} is declared twice")
        _OPS[name] = OpInfo(family, letters, **known)


def along(ctx: OpContext) -> Mapping[str, Iterable[int]]:
    """Mixes along the argument `dim`: one dim, several, or all of them if none is given."""
    dims = ctx.get("dim")
    if isinstance(dims, int):
        return {"self": [dims]}
    return {"self": dims or range(len(ctx.shape(ctx["self"])))}


def defaults(family: Family, ids: Rule | None = None, absent: Absent | None = None) -> None:
    """What the ops of a family do that are declared without a rule, or without a meaning, of their own."""
    if ids is not None:
        _IDS[family] = ids
    if absent is not None:
        _ABSENT[family] = absent


def op_name(node: fx.Node) -> str:
    """`add` for aten.add.Tensor; other namespaces keep theirs: `torchvision::nms`."""
    return target_name(node.target)


def target_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    return str(schema.name).removeprefix("aten::")


def info(node: fx.Node) -> OpInfo:
    """What is known of a node's op; one that is not declared is opaque."""
    return named(op_name(node))


def named(name: str) -> OpInfo:
    """What is known of an op by its name."""
    return _OPS.get(name, _OPAQUE)


def rule_of(node: fx.Node) -> Rule:
    found = info(node)
    return found.ids or _IDS[found.family]


def absent_of(node: fx.Node) -> Absent:
    found = info(node)
    return found.absent or _ABSENT[found.family]


def family(name: str) -> Family:
    """The family of an op by its ATen name."""
    return named(name).family


def has(name: str, trait: Trait) -> bool:
    """Whether an op, by name, has a trait; one in place has it if its functional form does."""
    return trait in named(name.rstrip("_")).traits


def alike(name: str) -> str:
    """One name for ops that differ only by how a tensor lies in memory."""
    return named(name).alike or name


def in_float64(target: Any) -> Any:
    """An op, or what computes the same in float64 where its own kernel does not know that type."""
    return named(target_name(target)).in_float64 or target


def known() -> dict[str, OpInfo]:
    """Every op that is declared, by name."""
    return dict(sorted(_OPS.items()))


def bound(node: fx.Node) -> Product | None:
    """The products of an op as it was recorded; None if it is declared without letters, or for operands of other
    dims.
    """
    letters, given = info(node).letters, arguments(node)
    if letters is None:
        return None
    text = letters if isinstance(letters, str) else letters(given)
    return bind(text, given, lambda value: spec(value).shape, spec(node).shape)


def product(node: fx.Node) -> Product | None:
    """The same for contractions alone: what has MACs, weights and channels that are summed over."""
    known = node.op == "call_function" and info(node).family is Family.CONTRACTION
    return bound(node) if known else None


def opaque(ctx: OpContext) -> Any:
    """An op without a rule: nothing that it touches may leave."""
    reason = f"op {op_name(ctx.node)} has no rule"
    for tensor in ctx.tensors:
        axes = ctx.axes(tensor)
        for part in axes if isinstance(axes, tuple) else (axes,):
            ctx.constraints.freeze_all(part, reason)
    spec = ctx.node.meta["spec"]
    return tuple({} for _ in spec) if isinstance(spec, tuple) else {}


_OPAQUE = OpInfo(Family.OPAQUE)
_IDS[Family.OPAQUE] = opaque


def shift(axes: ValueIds, ndim: int, to: int) -> ValueIds:
    """The same tracks in a value with more dims on the left, as broadcasting aligns them."""
    extra = to - ndim
    if extra == 0:
        return axes
    return {d + extra: t.reshape((1,) * extra + t.shape) for d, t in axes.items()}


def broadcast(
    ctx: OpContext, operands: list[tuple[ValueIds, tuple[int, ...]]], out: tuple[int, ...]
) -> ValueIds:
    """Entries of all operands meet: join the tracks of each dim; a dim that is fixed in one operand freezes
    the others.
    """
    ndim = len(out)
    aligned = [
        (shift(axes, len(shape), ndim), (1,) * (ndim - len(shape)) + tuple(shape)) for axes, shape in operands
    ]
    result: ValueIds = {}
    for dim in {d for axes, _ in aligned for d in axes}:
        tracks = [axes[dim] for axes, _ in aligned if dim in axes]
        if any(dim not in axes and shape[dim] != 1 for axes, shape in aligned):
            for track in tracks:
                ctx.constraints.freeze(track, "meets a tensor whose size here is fixed")
            continue
        result[dim] = meet(ctx.constraints, tracks)
    return result


def meet(constraints: Constraints, tracks: list[np.ndarray]) -> np.ndarray:
    """Join tracks that meet entry by entry; the most compressed one stands for all, and one of a tensor's for
    one of nobody's.
    """
    best = min(tracks, key=lambda t: t.size)
    for track in tracks:
        if track is not best:
            constraints.join(track, best)
    free = constraints.is_unowned(best)
    for track in tracks:
        if free.any() and track is not best:
            best = np.where(free, track, best)
            free = constraints.is_unowned(best)
    return best


def beside(constraints: Constraints, tracks: list[np.ndarray]) -> np.ndarray:
    """Join tracks of values that lie side by side; as the entries do not mix, one of nobody's stands for
    all.
    """
    best = meet(constraints, tracks)
    if any(constraints.is_unowned(track).any() for track in tracks):
        found: np.ndarray = constraints.collapse(np.stack(np.broadcast_arrays(*tracks)), 0)[0]
        for dim in range(found.ndim):
            found = constraints.collapse(found, dim) if best.shape[dim] == 1 else found
        return found
    return best
