"""compare(small, runs, shapes, choice) -> notes: where a small model's code passes other sizes than the cut
asks for.

The small model is run under a mode that holds each op against the recorded run. A size that should have
changed and did not is noted, and the right one is put in its place, so that one run finds all of them. So is
a number that the code compares a size with and found equal to it before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from surgeon.capture.hollow.mode import HollowRun, NeedsValuesError, hollow
from surgeon.capture.model_state import copies, quiet_run
from surgeon.capture.sizes.checked_size import CheckedInt
from surgeon.capture.sizes.tracing import Sizes, inside_transform, looking_inside_functional, rate_of_dropout
from surgeon.capture.value_dependent import RecordedReads
from surgeon.errors import MendError
from surgeon.graph.graph import Graph
from surgeon.graph.python_calls import VIEWS
from surgeon.graph.tensors import tensor_leaves
from surgeon.mend.checking.comparer import Comparer
from surgeon.mend.checking.constants import Constant
from surgeon.mend.checking.notes import Note
from surgeon.selection.cost import Choice, ShapeModel


def compare(
    small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice, comparisons: bool = True
) -> list[Note]:
    """Run the small model as the original was run and note every size that differs from what the cut asks
    for.

    Args:
        comparisons: where the code compares a new size with the old one, note it and let it find them equal
            as before.

    Raises:
        MendError: the small model takes another path through its code, or an op gives a shape that was not
            predicted.
    """
    return check(small, runs, shapes, choice, comparisons).notes


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a run of the small model showed: sizes that are wrong, and other numbers that changed."""

    notes: list[Note]
    constants: list[Constant]


def check(
    small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice, comparisons: bool = True
) -> Findings:
    """As `compare`; tells of numbers that are no sizes and differ from the recorded ones, too."""
    found = Findings([], [])
    for graph in runs:
        notes, constants = _compare_one(small, graph, shapes, choice, comparisons)
        found.notes.extend(notes)
        found.constants.extend(constants)
    return found


def _compare_one(
    small: nn.Module, graph: Graph, shapes: ShapeModel, choice: Choice, comparisons: bool
) -> tuple[list[Note], list[Constant]]:
    if graph.results is None:  # the record needed no numbers
        try:
            mode = Comparer(small, graph, shapes, choice)
            return _notes(small, graph, mode, comparisons, real=False), mode.constants
        except NeedsValuesError:
            pass
    mode = Comparer(small, graph, shapes, choice)
    return _notes(small, graph, mode, comparisons, real=True), mode.constants


def _notes(small: nn.Module, graph: Graph, mode: Comparer, comparisons: bool, real: bool) -> list[Note]:
    with quiet_run(small, 0, graph.training, dict(graph.answers), above=mode), mode.stack:
        try:
            args, kwargs = copies((graph.args, graph.kwargs))
            empty = None if real else hollow(mode, small, [t for _, t in tensor_leaves((args, kwargs))])
            with looking_inside_functional(), mode, _SmallSizes(mode, comparisons, empty):
                small(*args, **kwargs)
            if empty is not None and empty.asked:
                raise NeedsValuesError
            mode.ended()
        except Exception as error:  # the model's own code, on sizes that it does not know
            if not real:  # what stopped it may be the numbers that nobody computed
                raise NeedsValuesError from error
            if isinstance(error, MendError) and mode.notes.found:  # mend what is known, then look again
                return mode.notes.stopped(mode.at, error.what)
            if isinstance(error, MendError):
                raise
            if mode.notes.found or mode.notes.looked_ahead(mode.at):
                return mode.notes.stopped(mode.at, f"{type(error).__name__}: {error}")
            raise MendError(
                f"the small model does not run: {type(error).__name__}: {error}",
                where=mode.place(),
                why="its code uses a size that surgeon did not see",
                fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
            ) from error
    return mode.notes.found


class _SmallSizes(Sizes):
    """Hands out sizes that know what they were; catches reshapes that do not fit, which fail before they
    become an ATen op.
    """

    def __init__(self, comparer: Comparer, comparisons: bool, empty: HollowRun | None) -> None:
        super().__init__()
        self.empty = empty
        self.comparer, self.comparisons = comparer, comparisons
        self.reads = RecordedReads(comparer.reads)

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        old = self.comparer.old_shape(tensor) if self.comparisons else None
        if old is None or len(old) != tensor.dim() or old[dim] == size:
            return size
        return CheckedInt(size, old[dim], self.comparer.compared)

    def read(self, how: str, tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
        if self.empty is not None:
            self.empty.reads(tensor)
        return function(self.reads.value(tensor))

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        return self.comparer.product(number, run)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        rate = rate_of_dropout(name, args)
        if rate is not None:
            self.comparer.rate(rate)
        if inside_transform() or name not in VIEWS:
            return super().__torch_function__(func, types, args, kwargs)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            sizes = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
            made = self.comparer.reshaped(args[0], sizes)
            if made is None:
                raise
            return made
