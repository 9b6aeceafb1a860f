"""Comparer: a mode that holds each op of the small model against the recorded run, and corrects its sizes."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.aligned_run import AlignedRun, alike, same
from surgeon.capture.call_stack import user_line
from surgeon.capture.recording.aliasing import getitem
from surgeon.capture.value_dependent import replay
from surgeon.errors import MendError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Call, Graph, Spec, spec
from surgeon.graph.messages import source_line
from surgeon.graph.queries import made_of_numbers
from surgeon.graph.tensors import named_tensors
from surgeon.mend.checking.constants import Constant, changed_constants, same_numbers
from surgeon.mend.checking.expected_sizes import wanted
from surgeon.mend.checking.notes import Note, Notes, of_ones
from surgeon.ops.table import Trait, has, is_view, op_name
from surgeon.selection.cost import Choice, ShapeModel


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


def _slices(call: Call) -> bool:
    return has(op_name(call.node), Trait.SLICES)


@functools.cache
def _takes_a_part(func: Any) -> bool:
    return has(alike(func), Trait.SLICES)


class Comparer(AlignedRun):
    with_functions = True

    def __init__(self, small: nn.Module, graph: Graph, shapes: ShapeModel, choice: Choice) -> None:
        super().__init__(small, graph)
        self.small, self.shapes, self.choice = small, shapes, choice
        self.notes = Notes(small, self.calls, shapes, choice)
        self.constants: list[Constant] = []
        self.rates = iter(graph.rates)
        self.made = made_of_numbers(graph)
        self.wants: dict[fx.Node, dict[int, Any]] = {}  # sizes that were asked for
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
        self.notes.found.append(Note(self.at, self.stack.owner, user_line(), op, old, new, old))

    def rate(self, now: Any) -> None:
        """Hold the rate of the next dropout against the recorded one."""
        was = next(self.rates, now)
        if was != now:
            place = f"dropout in module '{self.stack.owner}' {source_line(user_line())}".rstrip()
            self.constants.append(Constant(None, "p", was, now, self.stack.owner, place))

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
            return self.run(func, args, kwargs) if out is None else out
        call = self.calls[self.at] if self.at < len(self.calls) else None
        if call is None or call.op is not func or _takes_a_part(func):
            try:
                call = self._match(func, args)
            except MendError:
                self.run(func, args, kwargs)  # one that fails was not recorded: the code may try it
                raise
        self._hold_constants(call, func, args, kwargs)
        args = self._corrected(call, list(args))
        out = None
        if "decision" in call.node.meta:  # the small model is to take the same path
            out = replay(call.node, args, kwargs)
        if out is None:
            out = self.run(func, args, kwargs)
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
        if call.node in self.made or same_numbers(call.node, args, kwargs, self.made):
            return
        with _disable_current_modes():  # the values are looked at outside of the run
            self.constants += changed_constants(
                call, Arguments(op, args, kwargs), self.made, self._want(call)
            )

    def _want(self, call: Call) -> dict[int, Any]:
        """The sizes among a recorded op's arguments as the small model must pass them."""
        known = self.wants.get(call.node)
        if known is None:
            known = self.wants[call.node] = wanted(call.node, self.shapes, self.choice)
        return known

    def _match(self, func: Any, args: Any) -> Call:
        name = alike(func)
        while self.at < len(self.calls):
            call = self.calls[self.at]
            left_out = has(name, Trait.SLICES) and self._belongs_later(call, args)
            if not left_out and same(call, func):
                return call
            if not _slices(call):
                break
            # torch leaves out a slice that takes everything: the old end is beyond the smaller tensor
            want = self._want(call)
            for position, value in want.items():
                old = call.node.args[position]
                self.notes.add(self.at, call.module, call, old, value, old)
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
        left = next((call for call in self.calls[self.at :] if not _slices(call)), None)
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
        rest = itertools.takewhile(_slices, self.calls[self.at + 1 :])
        return any(self._fits(later, args) for later in rest)

    def _fits(self, call: Call, args: Any) -> bool:
        """Whether all numbers of an op are those that were recorded, or those that the cut asks for."""
        old, want = call.node.args, self._want(call)
        return len(args) == len(old) and all(
            args[i] in (old[i], want.get(i, old[i])) for i in range(1, len(old))
        )

    def _corrected(self, call: Call, args: list[Any]) -> list[Any]:
        want = self._want(call)
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
                self.notes.add(self.at, self.stack.owner, call, old, new, got)
                args[position] = value
        return args

    def _idle(self, call: Call, old: Any, want: Sequence[int], got: Sequence[int]) -> bool:
        """Whether sizes of a value that nobody uses change where the cut asks for no change: it may be of any
        size there.
        """
        if call.node in self.used or not len(old) == len(want) == len(got):
            return False
        return all(found == new or before == new for before, new, found in zip(old, want, got, strict=True))

    def reshaped(self, x: Tensor, sizes: list[Any]) -> Tensor | None:
        """What a reshape that failed should have given, noted; None if it failed in the recorded run as well."""
        call = self.calls[min(self.at, len(self.calls) - 1)]
        want = list(self.shapes.shape(call.node, self.choice))
        if not is_view(call.node) or len(want) != len(sizes):
            if self.old_shape(x) in (None, tuple(x.shape)):  # the code tries it
                return None
            raise MendError(
                f"a reshape to {sizes} fails", where=self.place(), why="its sizes do not fit the smaller tensor",
                fix="compute the sizes from the tensor's shape, or keep the layer with ignore=[...]",
            )  # fmt: skip
        got = [n if g == -1 else g for g, n in zip(sizes, want, strict=True)]
        self.notes.add(self.at, self.stack.owner, call, call.node.args[1], want, got)
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
