"""Sizes as the model's code sees them: whole numbers that know which dims they were computed from.

A `TracedInt` is a dim's size, or an exact product or quotient of it: what it is used for keeps the same share. Any
other number computed from sizes is a `SizeNumber`. Where the code compares either, it decides on a size.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from surgeon.capture.paths.source_tests import compares, compares_numbers, holds_a_test, looks_up
from surgeon.graph.graph import Decision

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep  # torch's own asserts decide nothing
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclasses.dataclass(frozen=True)
class Follows:
    """A size that was computed from the size of `dim` of `node`."""

    node: fx.Node
    dim: int


class Size(int):
    """A size that knows more than its value; what is kept of it or copied is the value.

    Raises:
        TypeError: for einops, which remembers what it computed of sizes (and does without where they have no
            hash): the next tensor of the same shape would get numbers of this one.
    """

    def __hash__(self) -> int:
        _refuse_hash(sys._getframe(1))
        return hash(int(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


def _refuse_hash(frame: types.FrameType) -> None:
    if frame.f_globals.get("__name__", "").startswith("einops."):
        raise TypeError("a size that is traced has no hash here")


class _OfSizes:
    """What numbers have in common that were computed from sizes: where the code compares one it decides on a size."""

    sources: tuple[Follows, ...]

    def decides(self, other: Any, sign: str, went: bool | str, frame: types.FrameType) -> None:
        """The code decides on this number: sizes that are other ones may take it elsewhere."""
        path = frame.f_code.co_filename
        if path.startswith((_TORCH_DIR, _OWN_DIR)):
            return
        at_a_test = compares_numbers if sign else holds_a_test  # `max(a, b)` compares and gives a number
        if not (
            compares(frame)
            or at_a_test(path, frame.f_lineno)
            or (not sign and looks_up(path, frame.f_lineno))
        ):
            return
        self._note(sign, other, went, (path, frame.f_lineno))

    def _note(self, sign: str, other: Any, went: bool | str, line: tuple[str, int]) -> None:
        said = f"{_plain(self)} {sign} {_plain(other)}" if sign else f"{_plain(self)}"
        for source in self.sources:
            ways = source.node.meta.setdefault("decisions", [])
            ways.append(Decision("size", said, str(went), line, source.node, source.dim))

    def __eq__(self, other: object) -> bool:
        return _compare(self, other, operator.eq, "==")

    def __ne__(self, other: object) -> bool:
        return _compare(self, other, operator.ne, "!=")

    def __lt__(self, other: Any) -> bool:
        return _compare(self, other, operator.lt, "<")

    def __le__(self, other: Any) -> bool:
        return _compare(self, other, operator.le, "<=")

    def __gt__(self, other: Any) -> bool:
        return _compare(self, other, operator.gt, ">")

    def __ge__(self, other: Any) -> bool:
        return _compare(self, other, operator.ge, ">=")

    def __bool__(self) -> bool:
        went = bool(_plain(self))
        self.decides(None, "", went, sys._getframe(1))
        return went

    def _with(self, value: Any, other: Any = None) -> Any:
        """The result of arithmetic with another number, as far as it is a plain one."""
        kind = {int: SizeNumber, float: SizeQuotient}.get(type(value))
        if kind is None:
            return value
        more = other.sources if isinstance(other, _OfSizes) else ()
        return kind(value, tuple(dict.fromkeys((*self.sources, *more))))


class SizeQuotient(_OfSizes, float):  # type: ignore[misc]  # comparisons take any object, as those of int do
    """A quotient of sizes, or another number between whole ones that was computed of them."""

    def __new__(cls, value: float, sources: tuple[Follows, ...]) -> SizeQuotient:
        made = super().__new__(cls, value)
        made.sources = sources
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    __hash__ = float.__hash__


def _follow_arithmetic(kind: type, operators: Iterable[Callable[..., Any]], single: str) -> None:
    """Give a kind of number operators whose results know the same sources."""
    for operate in operators:
        name = operate.__name__.strip("_")

        def forward(self: Any, other: Any, operate: Any = operate) -> Any:
            return self._with(operate(_plain(self), _plain(other)), other)

        def backward(self: Any, other: Any, operate: Any = operate) -> Any:
            return self._with(operate(_plain(other), _plain(self)), other)

        setattr(kind, f"__{name}__", forward)
        setattr(kind, f"__r{name}__", backward)
    for name in single.split():

        def alone(self: Any, *digits: int, name: str = f"__{name}__") -> Any:
            return self._with(getattr(_plain(self), name)(*digits))

        setattr(kind, f"__{name}__", alone)


class SizeNumber(_OfSizes, Size):
    """A whole number that was computed from sizes."""

    def __new__(cls, value: int, sources: tuple[Follows, ...]) -> SizeNumber:
        made = super().__new__(cls, value)
        made.sources = sources
        return made

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __float__(self) -> float:  # `math.sqrt(size)` gives a number that is not followed
        self.decides(None, "", "", sys._getframe(1))
        return float(int(self))

    def __hash__(self) -> int:  # it is looked for in a set or a dict
        frame = sys._getframe(1)
        _refuse_hash(frame)
        self.decides(None, "", "", frame)
        return hash(int(self))

    def _named(self, frame: types.FrameType) -> None:
        """A text is made of it, by which the code may look for something, somewhere."""
        if not frame.f_code.co_filename.startswith((_TORCH_DIR, _OWN_DIR)):
            self._note("", None, "", (frame.f_code.co_filename, frame.f_lineno))

    def __repr__(self) -> str:
        self._named(sys._getframe(1))
        return repr(int(self))

    def __str__(self) -> str:
        self._named(sys._getframe(1))
        return repr(int(self))

    def __format__(self, how: str) -> str:
        self._named(sys._getframe(1))
        return format(int(self), how)


_ARITHMETIC = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
)
_OF_BITS = operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift
_follow_arithmetic(SizeQuotient, _ARITHMETIC, "neg abs ceil floor trunc round")
_follow_arithmetic(SizeNumber, (*_ARITHMETIC, *_OF_BITS), "neg abs")


def _compare(number: Any, other: Any, compare: Callable[[Any, Any], bool], sign: str) -> bool:
    result = compare(_plain(number), _plain(other))
    if isinstance(other, int | float):
        frame = sys._getframe(2)
        number.decides(other, sign, result, frame)
        if isinstance(number, TracedInt):
            number.held_against(other, frame)
    return result


class TracedInt(SizeNumber):
    """A size, or a share or multiple of it, with the dim that it was read from."""

    def __new__(cls, value: int, source: Follows) -> TracedInt:
        made = super().__new__(cls, value, (source,))
        assert isinstance(made, TracedInt)
        return made

    @property
    def source(self) -> Follows:
        return self.sources[0]

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and int(other) and int(self) % int(other) == 0:
            return self._derived(int(self) // int(other), other)
        return super().__floordiv__(other)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, TracedInt) and int(self) == 1:  # a batch of one says nothing
            return TracedInt(int(other), other.source)
        return self._derived(int(self) * _plain(other), other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return self._shifted(int(self) + _plain(other), other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._shifted(int(self) - _plain(other), other)

    def __rsub__(self, other: Any) -> Any:
        self.held_against(other, sys._getframe(1))
        return super().__rsub__(other)

    def __mod__(self, other: Any) -> Any:
        self.held_against(other, sys._getframe(1))
        return super().__mod__(other)

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), self.source)

    def _shifted(self, value: Any, other: Any) -> Any:
        """A share of a size more or less is a share of it; so is nothing more. Any other number is a decision
        on it.
        """
        same = isinstance(other, TracedInt) and other.source == self.source
        if same or (isinstance(other, int) and not isinstance(other, TracedInt | bool) and not int(other)):
            return TracedInt(value, self.source)
        self.held_against(other, sys._getframe(2))
        return self._with(value, other)

    def _derived(self, value: Any, other: Any) -> Any:
        if type(value) is int and (not isinstance(other, TracedInt) or int(other) == 1):
            return TracedInt(value, self.source)
        return self._with(value, other)

    def held_against(self, other: Any, frame: types.FrameType) -> None:
        """The code holds the size against a number of its own: the number may have to change with it."""
        if not isinstance(other, TracedInt) and not frame.f_code.co_filename.startswith(_TORCH_DIR):
            self.source.node.meta.setdefault("decided", set()).add(self.source.dim)


def _plain(number: Any) -> Any:
    """A number without what it knows."""
    if isinstance(number, Size):
        return int(number)
    return float(number) if isinstance(number, SizeQuotient) else number
