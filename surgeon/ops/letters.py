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
import re
from collections.abc import Sequence
from functools import cache, cached_property

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
