"""Products of an op on given operands: `bind` writes the letters out for their shapes.

`Product` says from them what the stages ask: MACs, sizes of operands, which dims are an operand's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from surgeon.graph.arguments import Arguments
from surgeon.ops.letters import Dim, Operand, Step, parse

Shape = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Product:
    """An op's products on given operands: runs are written out, and optional operands that were not given left out.

    Attributes:
        sizes: of every letter.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]

    @property
    def macs(self) -> int:
        """Multiply-accumulates. A product that sums over nothing (an outer product, a lookup) has none."""
        return sum(self.count(step.computed) for step in self.steps if step.summed)

    def count(self, letters: frozenset[str]) -> int:
        return math.prod(self.sizes[letter] for letter in letters)

    def shape(self, operand: Operand) -> tuple[int, ...]:
        """Sizes of an operand whose dims have letters."""
        return tuple(self.count(frozenset(dim.letters)) for dim in operand.dims)

    @property
    def operands(self) -> list[Operand]:
        """Those that are arguments of the op and multiplied, in order."""
        return [operand for step in self.steps for operand in step.operands if operand.name]

    @property
    def out(self) -> Operand:
        return self.steps[-1].out

    @property
    def added(self) -> tuple[Operand, ...]:
        """What is added to the result."""
        return self.steps[-1].added

    @cached_property
    def windows(self) -> bool:
        """Whether it is a convolution."""
        return any(dim.window for step in self.steps for o in (*step.operands, step.out) for dim in o.dims)

    def resized(
        self, shapes: Mapping[str, Shape], out: Shape, given: Mapping[str, int] | None = None
    ) -> Product:
        """The same products on operands of these shapes, by name."""
        known = [pair for o in self.operands for pair in zip(o.dims, shapes[o.name], strict=True)]
        known += zip(self.out.dims, out, strict=True)
        return Product(self.steps, _sizes(known, given or {}))

    def own(self, operand: Operand) -> list[int]:
        """Dims of an operand that the result has from it alone: the output channels of a weight."""
        others = frozenset(
            letter for other in self.operands if other.name != operand.name for letter in other.letters
        )
        return operand.with_any((operand.letters & self.out.letters) - others)


def bind(
    text: str,
    arguments: Arguments,
    shape_of: Callable[[Any], Shape],
    out: Shape,
    given: Mapping[str, int] | None = None,
) -> Product | None:
    """The products of an op that was called with these arguments; None if the operands do not have these dims.

    Args:
        shape_of: the shape of an argument that is a tensor.
        out: the shape of the result.
        given: sizes of letters that no shape tells, of `(nh)` that of h. Otherwise n takes all of it.

    Example: "input:n(gc)<PK>, weight:(go)cK -> n(go)P" on shapes [2, 6, 8], [4, 3, 5] and [2, 4, 4] has the sizes
    n=2, g=2, c=3, o=2, P0=4, K0=5: c from the weight, so g from 6 channels, so o from 4 filters.
    """
    shapes: dict[str, Shape] = {}
    known: list[tuple[str, str, int]] = []
    for name in _names(text):
        value = arguments.get(name)
        if value is not None:
            own = arguments.name(name)
            shapes[own] = shape_of(value)
            known.append((name, own, len(shapes[own])))
    steps = _steps(text, tuple(known), len(out))
    return None if steps is None else Product(steps, {}).resized(shapes, out, given)


@cache
def _names(text: str) -> tuple[str, ...]:
    """The arguments that a text names."""
    every = (o.name for step in parse(text) for o in (*step.operands, *step.added) if o.name)
    return tuple(dict.fromkeys(every))


@cache
def _steps(text: str, known: tuple[tuple[str, str, int], ...], rank: int) -> tuple[Step, ...] | None:
    """The products of a text, written out for operands of these ranks; None if they cannot have them.

    Args:
        known: of each argument that was given: its name in the text, the name that the op has for it, its rank.
        rank: of the result.
    """
    given = {name: (own, ndim) for name, own, ndim in known}
    steps: list[Step] = []
    written = parse(text)
    for step in written:

        def found(operand: Operand) -> Operand | None:
            own, ndim = given[operand.name] if operand.name else ("", len(steps[-1].out.dims))
            named = Operand(own, operand.dims)
            return _written_out(named, ndim) if operand.dims else named

        operands = [found(o) for o in step.operands if not o.name or o.name in given]
        added = [found(o) for o in step.added if not o.name or o.name in given]
        result = _written_out(step.out, rank if step is written[-1] else _rank(step.out, operands))
        if result is None or None in operands or None in added:
            return None
        steps.append(Step(tuple(filter(None, operands)), tuple(filter(None, added)), result))
    return tuple(steps)


def _rank(out: Operand, operands: Sequence[Operand | None]) -> int:
    """Of the result of a product that is not the last one: as many dims for a run as an operand has."""
    every = {letter for operand in operands if operand is not None for letter in operand.letters}
    runs = {
        dim.letters[0]: sum(letter.startswith(dim.letters[0]) for letter in every)
        for dim in out.dims
        if dim.run
    }
    return sum(runs[dim.letters[0]] if dim.run else 1 for dim in out.dims)


def _written_out(operand: Operand, rank: int) -> Operand | None:
    """An operand with letters R1, R0 in place of a run R of two dims (numbered from the right, as dims are
    aligned); None if it cannot have `rank` dims.
    """
    runs = sum(dim.run for dim in operand.dims)
    length = rank - (len(operand.dims) - runs)
    if runs > 1 or length < 0 or (not runs and length):
        return None
    dims: list[Dim] = []
    for dim in operand.dims:
        places = range(length - 1, -1, -1) if dim.run else ()
        dims += [Dim(tuple(f"{letter}{i}" for letter in dim.letters), window=dim.window) for i in places]
        dims += [] if dim.run else [dim]
    return Operand(operand.name, tuple(dims))


def _sizes(known: Sequence[tuple[Dim, int]], given: Mapping[str, int]) -> dict[str, int]:
    """Sizes of letters from those of dims: those of single letters first, then merged dims with one unknown."""
    sizes = dict(given)
    left = []
    for dim, size in known:
        if len(dim.letters) == 1 and not dim.window:
            sizes[dim.letters[0]] = max(sizes.get(dim.letters[0], 1), size) if size else 0
        elif not dim.window:
            left.append((dim, size))
    while left:
        unknown = [[letter for letter in dim.letters if letter not in sizes] for dim, _ in left]
        at = min(range(len(left)), key=lambda i: len(unknown[i]))
        dim, size = left.pop(at)
        if unknown[at]:
            first, *others = unknown[at]
            sizes |= dict.fromkeys(others, 1)
            rest = math.prod(sizes[letter] for letter in dim.letters if letter != first)
            sizes[first] = size // rest if rest else 0
    return sizes
