"""compare(small, runs, shapes, choice) -> notes: where a small model's code passes other sizes than the cut
asks for.

The small model is run under a mode that holds each op against the recorded run. A size that should have
changed and did not is noted, and the right one is put in its place, so that one run finds all of them. So is
a number that the code compares a size with and found equal to it before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.aligned_run import AlignedRun, alike, same
from surgeon.capture.call_stack import user_line
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.capture.recording.aliasing import getitem
from surgeon.capture.sizes.traced_size import CheckedInt
from surgeon.capture.sizes.tracing import Sizes, inside_transform, looking_inside_functional
from surgeon.capture.value_dependent import RecordedReads, replay
from surgeon.errors import MendError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Call, Graph, Spec, spec
from surgeon.graph.messages import source_line
from surgeon.graph.queries import made_of_numbers
from surgeon.graph.tensors import named_tensors
from surgeon.mend.constants import Constant, Rate, changed_constants
from surgeon.mend.expected_sizes import wanted
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
        mode = _Comparer(small, graph, shapes, choice)
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


def _compare_one(small: nn.Module, graph: Graph, mode: _Comparer, comparisons: bool) -> list[Note]:
    with quiet_run(small, 0, graph.training, dict(graph.answers)), mode.stack:
        try:
            with looking_inside_functional(), mode, _SmallSizes(mode, comparisons):
                output_of(small, graph.args, graph.kwargs)
            mode.ended()
        except MendError as error:
            if not mode.notes:  # else: mend what is known, then look again
                raise
            return mode.stopped(error.what)
        except Exception as error:
            if mode.notes or mode.looked_ahead():
                return mode.stopped(f"{type(error).__name__}: {error}")
            raise MendError(
                f"the small model does not run: {type(error).__name__}: {error}",
                where=mode.place(),
                why="its code uses a size that surgeon did not see",
                fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
            ) from error
    return mode.notes


def of_ones(calls: Iterable[Call], shapes: ShapeModel, choice: Choice) -> str:
    """What else to do if a width of these ops is 1 now: code may treat it apart (`squeeze`)."""
    for call in calls:
        spec = call.node.meta["spec"]
        if isinstance(spec, Spec) and any(
            now == 1 < was for was, now in zip(spec.shape, shapes.shape(call.node, choice), strict=True)
        ):
            return "; or keep two channels everywhere with min_channels=2: a width is 1 now, which code may treat apart"
    return ""


def _used(graph: Graph) -> set[fx.Node]:
    """Nodes that an output hangs on."""
    found: set[fx.Node] = set()
    todo = [node for _, node in graph.outputs]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


class _SmallSizes(Sizes):
    """Hands out sizes that know what they were; catches reshapes that do not fit, which fail before they
    become an ATen op.
    """

    def __init__(self, comparer: _Comparer, comparisons: bool) -> None:
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
        if name.endswith("dropout") and len(args) > 1:  # (input, rate, training), by torch's layers as well
            self.comparer.rates.append(Rate(self.comparer.stack.owner, source_line(user_line()), args[1]))
        if inside_transform() or name not in ("reshape", "view"):
            return super().__torch_function__(func, types, args, kwargs)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            sizes = list(args[1]) if len(args) == 2 and isinstance(args[1], list | tuple) else list(args[1:])
            return self.comparer.reshaped(args[0], sizes)


class _Comparer(AlignedRun):
    def __init__(self, small: nn.Module, graph: Graph, shapes: ShapeModel, choice: Choice) -> None:
        super().__init__(small, graph)
        self.small, self.shapes, self.choice = small, shapes, choice
        self.notes: list[Note] = []
        self.constants: list[Constant] = []
        self.rates: list[Rate] = []
        self.made = made_of_numbers(graph)
        self.ran: list[tuple[Any, Any, Any]] = []  # ops inside of a product, with their arguments
        self.known: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...]]] = {}
        self.inside = False  # a product, whose ops are torch's matter
        self.used = _used(graph)
        self.reads = graph.reads
        for name, tensor in named_tensors(small):
            if name in graph.tensors:
                self._know(tensor, tuple(graph.tensors[name].shape))

    def _know(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        self.known[id(tensor)] = weakref.ref(tensor), shape

    def old_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape that a tensor had in the recorded run."""
        ref, shape = self.known.get(id(tensor), (None, None))
        return shape if ref is not None and ref() is tensor else None

    def compared(self, op: str, old: int, new: int) -> None:
        """Note that the code compares a size, which is `new`, with the number that it was."""
        self.notes.append(Note(self.at, self.stack.owner, user_line(), op, old, new, old))

    def stopped(self, why: str) -> list[Note]:
        """The notes of a run that did not reach its end: there may be more to note."""
        return [dataclasses.replace(note, stopped=why, reached=self.at) for note in self.notes]

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = super().call(func, args, kwargs)
        if isinstance(out, Tensor) and self.old_shape(out) is None and args and isinstance(args[0], Tensor):
            before = self.old_shape(args[0])  # such as a copy, which is not held against the record
            if before is not None and out.shape == args[0].shape:
                self._know(out, before)
        return out

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        """A product that was recorded under this number: what it gives is held against the record, not the
        ops that make it.
        """
        if self.at == len(self.calls) or self.calls[self.at].within != number:
            return run()
        self.inside, self.ran = True, []
        try:
            out = run()
        except Exception:  # noqa: BLE001  # whatever torch raises, the op that does is found now
            self.inside = False
            return run()
        finally:
            self.inside = False
        calls = [*itertools.takewhile(lambda call: call.within == number, self.calls[self.at :])]
        last = self.at + len(calls) - 1
        if len(calls) == len(self.ran) and all(same(c, r[0]) for c, r in zip(calls, self.ran, strict=True)):
            for call, (op, args, kwargs) in zip(calls, self.ran, strict=True):
                self._hold_constants(call, op, args, kwargs)
        self.ran = []
        self._check(self.calls[last], out)
        self._know(out, spec(self.calls[last].node).shape)
        self.at = last + 1
        return out

    def op(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if self.inside:
            self.ran.append((func, args, kwargs))
            return func(*args, **kwargs) if out is None else out
        call = self._match(func, args)
        self._hold_constants(call, func, args, kwargs)
        args = self._corrected(call, list(args))
        out = None
        if "decision" in call.node.meta:  # the small model is to take the same path
            out = replay(call.node, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        self._check(call, out)
        specs = call.node.meta["spec"]
        several = isinstance(out, list | tuple)
        for tensor, was in (
            zip(out, specs, strict=False) if several and isinstance(specs, tuple) else [(out, specs)]
        ):
            if isinstance(tensor, Tensor) and isinstance(was, Spec):
                self._know(tensor, was.shape)
        self.at += 1
        return out

    def _hold_constants(self, call: Call, op: Any, args: Any, kwargs: Any) -> None:
        sizes = wanted(call.node, self.shapes, self.choice)
        with _disable_current_modes():  # the values are looked at outside of the run
            self.constants += changed_constants(call, Arguments(op, args, kwargs), self.made, sizes)

    def _match(self, func: Any, args: Any) -> Call:
        name = alike(func)
        while self.at < len(self.calls):
            call = self.calls[self.at]
            left_out = name == "slice" and self._belongs_later(call, args)
            if not left_out and same(call, func):
                return call
            if op_name(call.node) != "slice":
                break
            # torch leaves out a slice that takes everything: the old end is beyond the smaller tensor
            want = wanted(call.node, self.shapes, self.choice)
            for position, value in want.items():
                self._note(call, call.node.args[position], value, call.node.args[position], call.module)
            self.at += 1
        raise MendError(
            "the small model takes another path through its code than the original",
            where=self.place(),
            why=f"it ran {name} here; a decision in the code depends on a size that changed",
            fix="keep the layer with ignore=[...], or make the decision in __init__" + self._of_ones(),
        )

    def ended(self) -> None:
        """The run came to its end: so should it in the record. A slice that takes everything may be missing.

        Raises:
            MendError: ops are left.
        """
        left = next((call for call in self.calls[self.at :] if op_name(call.node) != "slice"), None)
        if left is not None:
            raise MendError(
                "the small model takes another path through its code than the original",
                where=f"{op_name(left.node)} in module '{left.module}' {source_line(left.source)}".rstrip(),
                why="it ended before this op; a loop or a decision in the code depends on a size that changed",
                fix="keep the layer with ignore=[...], or make the decision in __init__" + self._of_ones(),
            )

    def _of_ones(self) -> str:
        return of_ones(self.calls[: self.at + 1], self.shapes, self.choice)

    def _belongs_later(self, call: Call, args: Any) -> bool:
        """Whether a slice is not this recorded one, but one of those right after it: torch left out those
        between.
        """
        if self._fits(call, args):
            return False
        rest = itertools.takewhile(lambda later: op_name(later.node) == "slice", self.calls[self.at + 1 :])
        return any(self._fits(later, args) for later in rest)

    def _fits(self, call: Call, args: Any) -> bool:
        """Whether all numbers of an op are those that were recorded, or those that the cut asks for."""
        old, want = call.node.args, wanted(call.node, self.shapes, self.choice)
        return len(args) == len(old) and all(
            args[i] in (old[i], want.get(i, old[i])) for i in range(1, len(old))
        )

    def _corrected(self, call: Call, args: list[Any]) -> list[Any]:
        want = wanted(call.node, self.shapes, self.choice)
        for position, value in want.items():
            if position >= len(args):
                continue
            old = call.node.args[position]
            got, new = args[position], value
            if isinstance(new, list):
                got = (
                    [g if g != -1 else n for g, n in zip(got, new, strict=False)]
                    if len(got) == len(new)
                    else got
                )
            if got != new and not (isinstance(new, list) and self._idle(call, old, new, got)):
                self._note(call, old, new, got)
                args[position] = value
        return args

    def _idle(self, call: Call, old: Any, want: Sequence[int], got: Sequence[int]) -> bool:
        """Whether sizes of a value that nobody uses change where the cut asks for no change: it may be of any
        size there.
        """
        if call.node in self.used or not len(old) == len(want) == len(got):
            return False
        return all(found == new or before == new for before, new, found in zip(old, want, got, strict=True))

    def _note(self, call: Call, old: Any, want: Any, got: Any, module: str | None = None) -> None:
        several = isinstance(want, list)
        triples = zip(old, want, got, strict=False) if several else [(old, want, got)]
        for place, (before, new, found) in enumerate(triples):
            if new != found:
                numbers = int(before), int(new), int(found), place if several else -1
                self.notes.append(
                    Note(
                        self.at,
                        self.stack.owner if module is None else module,
                        call.source,
                        op_name(call.node),
                        *numbers,
                    )
                )

    def looked_ahead(self) -> bool:
        """Note the next recorded size that must change: the code stopped before it, perhaps because it checks
        sizes.

        If the next op takes no size, what changes in its shape: torch's Python functions check sizes that no
        op is given.
        """
        for call in self.calls[self.at :]:
            if (
                call is self.calls[self.at]
                and not wanted(call.node, self.shapes, self.choice)
                and call.node.meta["spec"]
            ):
                old_shape, new_shape = spec(call.node).shape, self.shapes.shape(call.node, self.choice)
                self._note(call, list(old_shape), list(new_shape), list(old_shape), call.module)
                if self.notes:
                    self._note_its_kind(call)
                    return True
            for position, value in wanted(call.node, self.shapes, self.choice).items():
                old: Any = call.node.args[position]
                if isinstance(value, list):  # -1: what is left over
                    old = [n if o == -1 else o for o, n in zip(old, value, strict=True)]
                if not call.node.meta.get("derived"):
                    self._note(call, old, value, old, call.module)
            if self.notes:
                return True
        return False

    def _note_its_kind(self, call: Call) -> None:
        """The same of other modules of the class in which the code stopped: they would stop it next, one by
        one.
        """
        kind, seen = type(self.small.get_submodule(call.module)), {call.module}
        for later in self.calls[self.at + 1 :]:
            if (
                later.module in seen
                or later.op is not call.op
                or type(self.small.get_submodule(later.module)) is not kind
            ):
                continue
            seen.add(later.module)
            old = list(spec(later.node).shape)
            self._note(later, old, list(self.shapes.shape(later.node, self.choice)), old, later.module)

    def reshaped(self, x: Tensor, sizes: list[Any]) -> Tensor:
        """What a reshape that failed should have given, noted."""
        call = self.calls[self.at]
        want = list(self.shapes.shape(call.node, self.choice))
        if alike(call.op) != "view" or len(want) != len(sizes):
            raise MendError(
                f"a reshape to {sizes} fails", where=self.place(), why="its sizes do not fit the smaller tensor",
                fix="compute the sizes from the tensor's shape, or keep the layer with ignore=[...]",
            )  # fmt: skip
        self._note(
            call, call.node.args[1], want, [n if g == -1 else g for g, n in zip(sizes, want, strict=True)]
        )
        return x.reshape(want)

    def _check(self, call: Call, out: Any) -> None:
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, Tensor) or call.node.target is getitem:
            return
        expected = self.shapes.shape(call.node, self.choice)
        was = call.node.meta["spec"]
        idle = isinstance(was, Spec) and self._idle(call, was.shape, expected, first.shape)
        if tuple(first.shape) != expected and first.numel() and not idle:
            raise MendError(
                f"op {op_name(call.node)} of the small model gives shape {tuple(first.shape)}, predicted was {expected}",
                where=self.place(),
                why="the model's code uses a size that surgeon did not see",
                fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]"
                + self._of_ones(),
            )
