"""Recording: the batches as recorded graphs of both models, and how far apart their outputs are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx, nn

from surgeon.capture.aligned_run import alike
from surgeon.capture.batches import Batch, record
from surgeon.capture.recording.aliasing import getitem
from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.tensors import as_real, tensor_leaves
from surgeon.ops.table import op_name
from surgeon.recovery.runs.paired_run import PairedRun

_READS = frozenset(
    ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
)  # shapes and paths that values decide


Progress = Callable[[Iterable[Any], str], Iterable[Any]]  # wraps what is walked through, to show progress


@dataclasses.dataclass
class Pair:
    """One batch, recorded on both models; `held` batches are not learned from, they judge."""

    big: PairedRun
    small: PairedRun
    held: bool


class Recording:
    """The batches as graphs: every shape of input is recorded once, or every batch if the run takes decisions
    that data make.

    Attributes:
        big, small: the first batch's graphs, in whose nodes everything is said.
    """

    def __init__(
        self, model: nn.Module, small: nn.Module, batches: Sequence[Batch], held: Sequence[bool]
    ) -> None:
        self._batches, self.held = batches, held
        self._models = model, small
        self._known: dict[Any, tuple[Graph, Graph]] = {}
        self.big, self.small = self._graphs(0)

    def pairs(self) -> list[Pair]:
        """Fresh runs of every batch."""
        return [self.pair(number) for number in range(len(self._batches))]

    @torch.no_grad()
    def distance(self) -> float:
        """How far the small model is from the original now, on the held batches."""
        return distance([pair for pair in self.pairs() if pair.held])

    def pair(self, number: int) -> Pair:
        """Fresh runs of one batch."""
        big, small = self._graphs(number)
        args, kwargs = self._batches[number]
        fed = [dataclasses.replace(graph, args=args, kwargs=kwargs) for graph in (big, small)]
        label = f"batch {number + 1}"
        taken = dict(zip(_decisions(small), _decisions(big), strict=False))
        return Pair(PairedRun(fed[0], label), PairedRun(fed[1], label, taken), self.held[number])

    def _graphs(self, number: int) -> tuple[Graph, Graph]:
        args, kwargs = self._batches[number]
        key: Any = tuple((path, tuple(tensor.shape)) for path, tensor in tensor_leaves((args, kwargs)))
        found = self._known.get(number) or self._known.get(key)
        if found is None:
            found = self._record(args, kwargs, f"batch {number + 1}")
            reads = any(
                "decision" in call.node.meta or op_name(call.node) in _READS for call in found[0].calls
            )
            self._known[number if reads else key] = found
        return found

    def _record(self, args: Any, kwargs: Any, label: str) -> tuple[Graph, Graph]:
        fix = "let the batches be what the model takes, without targets"
        big, small = (record(model, args, kwargs, label, fix) for model in self._models)
        if hasattr(self, "small"):
            for ours, theirs in ((self.big, big), (self.small, small)):
                _check_path(ours, theirs, label)
        return big, small


def _decisions(graph: Graph) -> list[fx.Node]:
    return [call.node for call in graph.calls if "decision" in call.node.meta]


def _check_path(ours: Graph, theirs: Graph, label: str) -> None:
    """Refuse a batch that runs other ops."""
    mine, other = list(ours.fx.nodes), list(theirs.fx.nodes)
    for a, b in zip(mine, other, strict=False):
        if a.op != b.op or (a.op == "call_function" and _name(a) != _name(b)):
            break
    else:
        if len(mine) == len(other):
            return
        a = mine[min(len(mine), len(other)) - 1]
    raise InputError(
        f"{label} takes another path through the model's code than the first batch",
        where=where(a),
        fix="pass batches of one shape",
    )


def _name(node: fx.Node) -> str:
    return "getitem" if node.target is getitem else alike(node.target)


def outputs(pair: Pair) -> Iterator[tuple[Tensor, Tensor]]:
    """What the original gives and what the small model gives, of each output of real or complex numbers;
    masked logits may well be -inf: left out."""
    for want, got in zip(map(as_real, pair.big.finish()), map(as_real, pair.small.finish()), strict=True):
        if want.is_floating_point() and want.shape == got.shape:
            known = torch.isfinite(want)
            yield want[known], got[known]


def distance(pairs: Iterable[Pair]) -> float:
    """Relative distance of the small model's outputs from the original's, root mean square over all of them.

    Raises:
        InputError: there are none.
    """
    off, size, count = 0.0, 0.0, 0
    for pair in pairs:
        for want, got in outputs(pair):
            count += want.numel()
            off += float((want.double() - got.double()).square().sum())
            size += float(want.double().square().sum())
    if not count:
        raise nothing_to_compare("the batches that are held out")
    return math.sqrt(off / max(size, 1e-300))


def nothing_to_compare(what: str) -> InputError:
    """The error for batches of which no output can be compared."""
    return InputError(
        "no output can be compared with the original's",
        where=what,
        why="whole numbers, such as those of classes, have no distance that could fall, and infinite values are left out",
        fix="recover a model that gives logits, without the argmax at its end",
    )
