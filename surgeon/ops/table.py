"""The op table: what is declared of each op, by name, and looked up by the stages."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import fx

from surgeon.graph.arguments import Arguments, arguments
from surgeon.graph.graph import spec
from surgeon.ops.product import Product, bind


class Family(enum.Enum):
    """What an op does to channels; every op that surgeon knows belongs to one family."""

    MOVEMENT = "movement"  # the same entries in other places: ids move along
    ELEMENTWISE = "elementwise"  # entries of several operands meet: their ids are joined
    CONTRACTION = "contraction"  # a dim of two operands is summed over: its ids are joined and end
    REDUCTION = "reduction"  # a dim of one operand ends, or its entries are normalised by each other
    FACTORY = "factory"  # a tensor made of constants: its dims follow whatever they meet
    OPAQUE = "opaque"  # anything else: freezes what it touches


Rule = Callable[[Any], Any]  # an OpContext -> the ids of the result, or a tuple of them
Mixes = Callable[[Any], Mapping[str, Iterable[int]]]  # an OpContext -> name of an operand -> dims
Absent = Callable[[Any], Any]  # a MaskedOp -> (data, mask), or a list of them
Letters = str | Callable[[Arguments], str]


class Trait(enum.Enum):
    """What else the stages ask of an op."""

    ATTENTION = "softmax(q k^T) v in one op"
    SCORES = "a batched product that may be one of queries with keys, or of their softmax with values"
    BATCH_NORM = "each channel is scaled and shifted by vectors"
    SATURATES = "an activation that gives zero for many inputs"
    SLICES = "takes a range of a dim"
    LOOKS_UP = "takes rows of a table by whole numbers"
    REPEATS = "gives the same entries several times, along dims that have one"
    COPIES = "gives what it was given: computes nothing"
    INCIDENTAL = "computes nothing, and runs or not by how tensors lie in memory and of which dtype they are"
    RESHAPES = "the same entries in the same order"
    PERMUTES = "the same entries, dims in another order"
    PROPORTIONAL = "its result is as many times larger as an operand is, or a power of it"
    SCALES = "multiplies one operand by the other, or divides it by the other"
    ADDS = "its result is the sum of its operands, or their difference"
    SUMS = "its result is a sum over dims, a mean of it, or a root: a norm"
    AVERAGES = "of equal numbers it gives that number, however many there are"


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


def defaults(family: Family, ids: Rule | None = None, absent: Absent | None = None) -> None:
    """What the ops of a family do that are declared without a rule, or without a meaning, of their own."""
    if ids is not None:
        _IDS[family] = ids
    if absent is not None:
        _ABSENT[family] = absent


def op_name(node: fx.Node) -> str:
    """`add` for aten.add.Tensor; other namespaces keep theirs: `torchvision::nms`."""
    known: str | None = node.meta.get(_NAME)  # derived once: recorded nodes do not change
    if known is None:
        known = node.meta[_NAME] = target_name(node.target)
    return known


def target_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    return str(schema.name).removeprefix("aten::")


def info(node: fx.Node) -> OpInfo:
    """What is known of a node's op; one that is not declared is opaque."""
    return _OPS.get(op_name(node), _OPAQUE)


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


def is_view(node: fx.Node) -> bool:
    """Whether an op gives the same entries in the same order, in the sizes that it is given."""
    return has(op_name(node), Trait.RESHAPES) and "size" in arguments(node)


def has(name: str, trait: Trait) -> bool:
    """Whether an op, by name, has a trait; one in place has it if its functional form does."""
    return trait in _OPS.get(name.rstrip("_"), _OPAQUE).traits


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
    letters = info(node).letters
    if letters is None:
        return None
    if _PRODUCT not in node.meta:  # bound once: recorded nodes do not change
        given = arguments(node)
        text = letters if isinstance(letters, str) else letters(given)
        node.meta[_PRODUCT] = bind(text, given, lambda value: spec(value).shape, spec(node).shape)
    found: Product | None = node.meta[_PRODUCT]
    return found


def product(node: fx.Node) -> Product | None:
    """The same for contractions alone: what has MACs, weights and channels that are summed over."""
    known = node.op == "call_function" and info(node).family is Family.CONTRACTION
    return bound(node) if known else None


_OPAQUE = OpInfo(Family.OPAQUE)
_PRODUCT, _NAME = "product", "op name"
