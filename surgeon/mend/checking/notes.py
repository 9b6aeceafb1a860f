"""Note: one number that the small model's code got wrong, and `Notes`, those of one run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgeon.graph.graph import Call, Spec, spec
from surgeon.graph.messages import source_line
from surgeon.mend.checking.expected_sizes import wanted
from surgeon.ops.table import op_name
from surgeon.selection.cost import Choice, ShapeModel

COMPARISONS = ("eq", "ne")


_END = sys.maxsize


@dataclasses.dataclass(frozen=True)
class Note:
    """One number that the small model's code got wrong: the op at `call` has `got` where the cut asks for
    `want`.

    An op of `COMPARISONS` is no op: before `call` the code compared a size, which is `want` now, with `got`.
    """

    call: int
    module: str
    source: tuple[str, int] | None
    op: str
    old: int
    want: int
    got: int
    place: int = -1  # where in a list of sizes; -1 for a single number
    stopped: str = dataclasses.field(
        default="", compare=False
    )  # with what the run stopped before its end, if it did
    reached: int = dataclasses.field(default=_END, compare=False)  # the op that it came to

    def __str__(self) -> str:
        line = source_line(self.source)
        op = f"comparison ({self.op})" if self.op in COMPARISONS else self.op
        return (
            f"{op} in module '{self.module}'"
            + (f" at {line}" if line else "")
            + f": {self.got} should be {self.want}"
        )


def of_ones(calls: Iterable[Call], shapes: ShapeModel, choice: Choice) -> str:
    """What else to do if a width of these ops is 1 now: code may treat it apart (`squeeze`)."""
    for call in calls:
        spec = call.node.meta["spec"]
        if isinstance(spec, Spec) and any(
            now == 1 < was for was, now in zip(spec.shape, shapes.shape(call.node, choice), strict=True)
        ):
            return "; or keep two channels everywhere with min_channels=2: a width is 1 now, which code may treat apart"
    return ""


class Notes:
    """The notes of one run of the small model.

    Attributes:
        found: the notes.
    """

    def __init__(self, small: nn.Module, calls: Sequence[Call], shapes: ShapeModel, choice: Choice) -> None:
        self.small, self.calls, self.shapes, self.choice = small, calls, shapes, choice
        self.found: list[Note] = []

    def add(self, at: int, module: str, call: Call, old: Any, want: Any, got: Any) -> None:
        """Note where numbers of a recorded op, single or in a list, are not what the cut asks for.

        Args:
            at: the recorded op that comes next in the run.
            module: the path of the module whose code runs.
        """
        several = isinstance(want, list)
        triples = zip(old, want, got, strict=False) if several else [(old, want, got)]
        for place, (before, new, found) in enumerate(triples):
            if new != found:
                numbers = int(before), int(new), int(found), place if several else -1
                self.found.append(Note(at, module, call.source, op_name(call.node), *numbers))

    def stopped(self, at: int, why: str) -> list[Note]:
        """The notes of a run that did not come further than `at`: there may be more to note."""
        return [dataclasses.replace(note, stopped=why, reached=at) for note in self.found]

    def looked_ahead(self, at: int) -> bool:
        """Note the next recorded size that must change: the code stopped before it, perhaps because it checks
        sizes.

        If the next op takes no size, what changes in its shape: torch's Python functions check sizes that no
        op is given.
        """
        for number, call in enumerate(self.calls[at:]):
            sizes = wanted(call.node, self.shapes, self.choice)
            if number == 0 and not sizes and call.node.meta["spec"]:
                self._add_shape(at, call)
                if self.found:
                    self._add_its_kind(at)
                    return True
            for position, value in sizes.items():
                old: Any = call.node.args[position]
                if isinstance(value, list):  # -1: what is left over
                    old = [n if o == -1 else o for o, n in zip(old, value, strict=True)]
                if not call.node.meta.get("derived"):
                    self.add(at, call.module, call, old, value, old)
            if self.found:
                return True
        return False

    def _add_shape(self, at: int, call: Call) -> None:
        """What changes in the shape of an op's result."""
        old = list(spec(call.node).shape)
        self.add(at, call.module, call, old, list(self.shapes.shape(call.node, self.choice)), old)

    def _add_its_kind(self, at: int) -> None:
        """The same of other modules of the class in which the code stopped: they would stop it next, one by
        one.
        """
        call = self.calls[at]
        kind, seen = type(self.small.get_submodule(call.module)), {call.module}
        for later in self.calls[at + 1 :]:
            if (
                later.module in seen
                or later.op is not call.op
                or type(self.small.get_submodule(later.module)) is not kind
            ):
                continue
            seen.add(later.module)
            self._add_shape(at, later)


def must_become(note: Note, value: int) -> tuple[int, int] | None:
    """(what a number must become, how many times) where the code passes a multiple of it, or a fraction
    (width // heads). Its sign stays.
    """
    found = _multiple(note, value)
    return found if found is not None and found[0] * value >= 0 else None


def _multiple(note: Note, value: int) -> tuple[int, int] | None:
    if note.want == 0 and note.got not in (0, value):  # of anything, none
        return None
    times, rest = divmod(note.got, value)
    if times and not rest and note.old % value == 0:
        return None if note.want % times else (note.want // times, times)
    times, rest = divmod(value, note.got) if note.got > 0 else (0, 1)
    return (note.want * times, times) if times and not rest else None


def divisor(note: Note, value: int) -> int | None:
    """What a number must become by which the code divides a width that stays (width // heads)."""
    product, rest = divmod(note.got * value, note.want) if note.want > 0 else (0, 1)
    return product if value > 1 and note.got > 0 and not rest and product != value else None
