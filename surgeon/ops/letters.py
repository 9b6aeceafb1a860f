"""Products as letters, as in einsum, from which everything else about them follows: MACs, who is summed with whom,
which operand is a weight, what a matrix kernel would be asked for.

    self:+, mat1:ik, mat2:kj -> ij                                       addmm
    input:Rk, weight:jk, bias:+ -> Rj                                    linear
    input:n(gc)<PK>, weight:(go)cK, bias:+(go) -> n(go)P                 convolution
    query:n(hg)qd, key:nhkd -> n(hg)qk, value:nhke -> n(hg)qe            attention: two products in a row

Each operand has the name of its argument and a letter for each of its dims. A letter that two operands have and the
result has not is summed over. `R`, a capital, stands for any number of dims, `(gc)` for a dim that g (outer) and c
(inner) were merged into, `<PK>` for dims along which windows of K entries start at P places. `n` numbers samples.
A plus: not multiplied, but added to the result (dims aligned from the right, if no letters follow).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from surgeon.graph.arguments import Arguments

Shape = Sequence[int]
_TOKEN = re.compile(r"\((?P<merged>[a-z]+)\)|<(?P<window>[A-Z]+)>|(?P<run>[A-Z])|(?P<one>[a-z])")


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dim of an operand, or (`run`) any number of them.

    Attributes:
        letters: several for a merged dim, outer to inner, and for a window.
        window: places that windows slide over: its size is not the product of its letters'.
    """

    letters: tuple[str, ...]
    run: bool = False
    window: bool = False


@dataclasses.dataclass(frozen=True)
class Operand:
    """Attributes:
    name: of the argument, alternatives separated by `|`; "" for the result of the product before.
    """

    name: str
    dims: tuple[Dim, ...]

    @cached_property
    def letters(self) -> frozenset[str]:
        return frozenset(letter for dim in self.dims for letter in dim.letters)

    def with_any(self, letters: frozenset[str]) -> list[int]:
        """The dims that have one of the letters."""
        return [i for i, dim in enumerate(self.dims) if not letters.isdisjoint(dim.letters)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One product: its operands, what is added to it, and the dims of its result."""

    operands: tuple[Operand, ...]
    added: tuple[Operand, ...]
    out: Operand

    @cached_property
    def summed(self) -> frozenset[str]:
        """Letters of several operands that the result has not."""
        return self._shared - self.out.letters

    @cached_property
    def kernel(self) -> frozenset[str]:
        """Letters of entries within windows."""
        every = (dim for operand in (*self.operands, self.out) for dim in operand.dims if dim.window)
        return frozenset(letter for dim in every for letter in dim.letters[1:])

    @cached_property
    def batch(self) -> frozenset[str]:
        """Letters of several operands and the result: they number products that are computed one by one."""
        return self._shared & self.out.letters

    @cached_property
    def computed(self) -> frozenset[str]:
        """Letters that a MAC is done for each combination of; one of a single operand alone is only picked from."""
        return self.out.letters | self._shared

    @cached_property
    def _shared(self) -> frozenset[str]:
        every = [letter for operand in self.operands for letter in operand.letters]
        return frozenset(letter for letter in every if every.count(letter) > 1)


def _dims(text: str) -> tuple[Dim, ...]:
    found = list(_TOKEN.finditer(text))
    if "".join(match.group() for match in found) != text:
        raise ValueError(f"{text!r} is not a list of dims")
    return tuple(
        Dim(
            tuple(match["merged"] or match["window"] or match.group()),
            run=bool(match["run"] or match["window"]),
            window=bool(match["window"]),
        )
        for match in found
    )


def _operand(text: str) -> Operand:
    name, _, letters = text.strip().partition(":")
    return Operand(name.strip(), _dims(letters.strip().removeprefix("+")))


@cache
def parse(text: str) -> tuple[Step, ...]:
    """The products that a text says, in order; see above.

    Raises:
        ValueError: it is no such text.
    """
    steps: list[Step] = []
    first, *others = text.split("->")
    given = [part for part in first.split(",") if part.strip()]
    for other in others:
        dims, *rest = other.split(",")
        out = Operand("", _dims(dims.strip()))
        steps.append(
            Step(
                tuple(_operand(part) for part in given if ":+" not in part),
                tuple(_operand(part) for part in given if ":+" in part),
                out,
            )
        )
        given = [f":{dims.strip()}", *rest]
    if not steps:
        raise ValueError(f"{text!r} has no result")
    return tuple(steps)


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
    steps: list[Step] = []
    shapes: dict[str, Shape] = {}
    written = parse(text)
    for step in written:
        named = {o: _named(o, arguments) for o in (*step.operands, *step.added)}
        shapes |= {o.name: shape_of(arguments[o.name]) for o in named.values() if o is not None and o.name}
        ranks = {
            o: len(shapes[o.name] if o.name else steps[-1].out.dims) for o in named.values() if o is not None
        }
        operands = [_written_out(o, ranks[o]) for o in map(named.get, step.operands) if o is not None]
        added = [
            _written_out(o, ranks[o]) if o.dims else o for o in map(named.get, step.added) if o is not None
        ]
        rank = len(out) if step is written[-1] else _rank(step.out, operands)
        result = _written_out(step.out, rank)
        if result is None or None in operands or None in added:
            return None
        steps.append(Step(tuple(filter(None, operands)), tuple(filter(None, added)), result))
    return Product(tuple(steps), {}).resized(shapes, out, given)


def _named(operand: Operand, arguments: Arguments) -> Operand | None:
    """An operand with the name that the op has for it; None if it was not given."""
    if operand.name and arguments.get(operand.name) is None:
        return None
    return dataclasses.replace(operand, name=arguments.name(operand.name)) if operand.name else operand


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
