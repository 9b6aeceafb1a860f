"""Numbers in a model's code that are no sizes and that changed with one: a scale, an epsilon, an exponent.

A run of the small model shows them: each number among an op's arguments is held against the recorded one. An
edit that is to blame for one is taken back, unless the number counts the terms of a sum that lost some, as
1/sqrt(head_dim) does.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.errors import MendError
from surgeon.graph.arguments import Arguments, arguments
from surgeon.graph.graph import Call, Graph, spec
from surgeon.graph.messages import where
from surgeon.graph.queries import number_in
from surgeon.mend.apply_edits import apply_edit, undo_edits
from surgeon.mend.edits import Edit
from surgeon.ops.sums import counts_terms, fed_by_inputs, follows, scales
from surgeon.ops.table import Family, Trait, family, has, op_name
from surgeon.selection.cost import Choice, ShapeModel

_NUMBERS = frozenset((int, float, bool, type(None), str, torch.dtype))
_OF_MEMORY = ("size", "stride", "storage_offset")  # of values whose shapes are predicted


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that an op of the small model's run gets where the recorded one got another."""

    node: fx.Node | None  # None: of a dropout, which is no op in eval mode
    argument: str
    before: float
    after: float
    module: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.before:.6g} became {self.after:.6g}"


def same_numbers(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], made: Mapping[fx.Node, Tensor]
) -> bool:
    """Whether all numbers that an op is called with are the recorded ones, seen without a look at its schema: then
    no constant has changed.
    """
    was = node.args
    if kwargs or node.kwargs or len(was) != len(args):
        return False
    for old, new in zip(was, args, strict=True):
        if isinstance(new, Tensor):
            if not isinstance(old, fx.Node) or old in made:
                return False
        elif type(new) is list:
            if not _NUMBERS.issuperset(map(type, new)) or old != new:
                return False
        elif type(new) not in _NUMBERS or isinstance(old, fx.Node) or old != new:
            return False
    return True


def changed_constants(
    call: Call, now: Arguments, made: Mapping[fx.Node, Tensor], sizes: Collection[int]
) -> Iterator[Constant]:
    """The numbers among an op's arguments that differ from the recorded ones.

    Args:
        now: what the op is called with.
        made: what of the recorded values hangs on nothing but numbers.
        sizes: the positions of arguments that are sizes.
    """
    was = arguments(call.node)
    if call.node in made:  # a step on the way to a number
        return
    for name, number in now.items():
        if name not in was or now.places[name] in sizes or name in _OF_MEMORY:
            continue
        pair = _pair(was[name], number, made)
        if pair is None or _same(*pair):
            continue
        if has(op_name(call.node), Trait.SLICES) and name in ("start", "end") and _beyond(was, now, name):
            continue
        yield Constant(call.node, name, *pair, call.module, where(call.node))


def _pair(was: Any, now: Any, made: Mapping[fx.Node, Tensor]) -> tuple[float, float] | None:
    """Two numbers to compare; of two tensors that the code made of numbers the first entries that differ."""
    if isinstance(was, fx.Node) and isinstance(now, Tensor):
        old = made.get(was)
        if old is None or old.shape != now.shape or old.is_complex() or old.is_meta or now.is_meta:
            return None
        odd = ((old != now) & ~(old.isnan() & now.isnan())).flatten()
        if not bool(odd.any()):
            return None
        first = int(odd.nonzero()[0])
        return float(old.flatten()[first]), float(now.flatten()[first])
    if isinstance(was, list | tuple) and isinstance(now, list | tuple) and len(was) == len(now):
        pairs = (_pair(a, b, made) for a, b in zip(was, now, strict=True))
        return next((pair for pair in pairs if pair is not None and not _same(*pair)), None)
    before, after = number_in(was, made), number_in(now, {})
    return None if before is None or after is None else (before, after)


def _same(before: float, after: float) -> bool:
    return before == after or (math.isnan(before) and math.isnan(after))


def _beyond(was: Arguments, now: Arguments, name: str) -> bool:
    """Whether an end of a slice moved beyond the end of the dim, which takes the same entries."""
    size = now["self"].shape[now["dim"]]
    return bool(spec(was["self"]).shape[now["dim"]] == size and min(was[name], now[name]) >= size)


class Judge:
    """Which changed constants follow a width by right."""

    def __init__(self, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice) -> None:
        self.shapes, self.choice = shapes, choice
        self.fed = set[fx.Node]().union(*map(fed_by_inputs, runs))

    def _kept(self, value: fx.Node, dim: int) -> int:
        return self.shapes.shape(value, self.choice)[dim]

    def counts(self, constant: Constant) -> bool:
        """Whether it is the number of terms of a sum that lost some, or a root or an inverse of it."""
        return self._is(counts_terms, constant)

    def _is(self, law: Callable[..., bool], constant: Constant) -> bool:
        node = constant.node
        if node is None or not scales(op_name(node), constant.argument):
            return False
        return law(node, constant.before, constant.after, self.fed, self._kept)

    def stray(self, constants: Collection[Constant]) -> list[Constant]:
        """The numbers that ops compute with and that follow a width which they do not sum over."""
        return [
            constant
            for constant in dict.fromkeys(constants)
            if not self._is(follows, constant)
            and (constant.node is None or family(op_name(constant.node)) is Family.ELEMENTWISE)
        ]

    def following(self, constants: Collection[Constant]) -> tuple[Constant, ...]:
        """The numbers that follow a width; others that the model's code computes from widths are refused.

        Raises:
            MendError: a number that ops compute with follows a width that they do not sum over.
        """
        stray = self.stray(constants)
        if stray:
            raise MendError(
                "a number in the model's code changes with a width that leaves, and scales no sum over it",
                where=str(stray[0]),
                why="the code computes it from the width of a tensor or of a layer",
                fix="make it a number of its own, set in __init__, or keep the layer with ignore=[...]",
            )
        return tuple(constant for constant in dict.fromkeys(constants) if self._is(follows, constant))


def to_blame(
    small: nn.Module, edits: Sequence[Edit], constants: Collection[Constant],
    look: Callable[[], Collection[Constant] | None],
) -> list[Edit]:  # fmt: skip
    """The edits without which some of the constants would be what they were.

    Args:
        constants: those that changed and should not have.
        look: runs the model as it is now; which constants differ, or None if it cannot tell.
    """
    found: list[Edit] = []
    for alike in _families(small, edits, constants):
        undo_edits(small, alike)
        try:
            now = look()
        except MendError:
            now = None
        if now is not None:
            better = {constant.module for constant in constants if constant not in now}
            found += [edit for edit in alike if any(_beside(edit.module, path) for path in better)]
        for edit in alike:
            apply_edit(small, edit)
    return found


def _families(small: nn.Module, edits: Sequence[Edit], constants: Collection[Constant]) -> list[list[Edit]]:
    """The edits of modules that hold a changed constant, or that its module holds; those that are alike (one class, one change)
    together.
    """
    families: dict[Any, list[Edit]] = defaultdict(list)
    for edit in edits:
        if any(_beside(edit.module, constant.module) for constant in constants):
            kind = next(
                kind
                for kind in type(small.get_submodule(edit.module)).__mro__
                if "_surgeon_edits" not in vars(kind)
            )
            families[kind, edit.kind, edit.name, edit.old, edit.new].append(edit)
    return list(families.values())


def _beside(one: str, other: str) -> bool:
    """Whether one of two modules holds the other, or they are the same."""
    inner, outer = sorted((one, other), key=len, reverse=True)
    return not outer or f"{inner}.".startswith(f"{outer}.")
