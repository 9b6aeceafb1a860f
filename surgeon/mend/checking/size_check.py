"""compare(small, runs, shapes, choice) -> notes: where a small model's code passes other sizes than the cut
asks for.

The small model is run under a mode that holds each op against the recorded run. A size that should have
changed and did not is noted, and the right one is put in its place, so that one run finds all of them. So is
a number that the code compares a size with and found equal to it before.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.call_stack import user_line
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.capture.sizes.traced_size import CheckedInt
from surgeon.capture.sizes.tracing import Sizes, inside_transform, looking_inside_functional
from surgeon.capture.value_dependent import RecordedReads
from surgeon.errors import MendError
from surgeon.graph.graph import Graph
from surgeon.graph.messages import source_line
from surgeon.graph.python_calls import DROPOUTS, VIEWS
from surgeon.mend.checking.comparer import Comparer
from surgeon.mend.checking.constants import Constant, Rate
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
    rates: list[Rate] = dataclasses.field(default_factory=list)


def check(
    small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice, comparisons: bool = True
) -> Findings:
    """As `compare`; tells of numbers that are no sizes and differ from the recorded ones, too."""
    found = Findings([], [])
    for graph in runs:
        mode = Comparer(small, graph, shapes, choice)
        with _buffers_kept(small):
            found.notes.extend(_compare_one(small, graph, mode, comparisons))
        found.constants.extend(mode.constants)
        found.rates.extend(mode.rates)
    return found


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a run in eval mode writes into buffers."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


def _compare_one(small: nn.Module, graph: Graph, mode: Comparer, comparisons: bool) -> list[Note]:
    with quiet_run(small, 0, graph.training, dict(graph.answers)), mode.stack:
        try:
            with looking_inside_functional(), mode, _SmallSizes(mode, comparisons):
                output_of(small, graph.args, graph.kwargs)
            mode.ended()
        except MendError as error:
            if not mode.notes.found:  # else: mend what is known, then look again
                raise
            return mode.notes.stopped(mode.at, error.what)
        except Exception as error:  # the model's own code, on sizes that it does not know
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

    def __init__(self, comparer: Comparer, comparisons: bool) -> None:
        super().__init__()
        self.comparer, self.comparisons = comparer, comparisons
        self.reads = RecordedReads(comparer.reads)

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        old = self.comparer.old_shape(tensor) if self.comparisons else None
        if old is None or len(old) != tensor.dim() or old[dim] == size:
            return size
        return CheckedInt(size, old[dim], self.comparer.compared)

    def read(self, how: str, tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
        return function(self.reads.value(tensor))

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        return self.comparer.product(number, run)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        if name in DROPOUTS and len(args) > 1:  # (input, rate, training), by torch's layers as well
            self.comparer.rates.append(Rate(self.comparer.stack.owner, source_line(user_line()), args[1]))
        if inside_transform() or name not in VIEWS:
            return super().__torch_function__(func, types, args, kwargs)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            sizes = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
            return self.comparer.reshaped(args[0], sizes)
