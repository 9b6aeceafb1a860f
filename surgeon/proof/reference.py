"""Reference: the original's graph run in float64 on tensors whose removed indices are absent."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.isolation.mode import Isolation
from surgeon.capture.recording.aliasing import getitem
from surgeon.capture.value_dependent import DRAWN, draws, replay
from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.arguments import Arguments, arguments
from surgeon.graph.graph import Graph, Read
from surgeon.graph.messages import source_line
from surgeon.graph.tensors import as_real, named_tensors, tensor_leaves
from surgeon.ops import masks
from surgeon.ops.masked_op import MaskedOp, is_narrow, leak, nest, wide
from surgeon.ops.masks import Mask
from surgeon.ops.sums import fed_by_inputs, follows, scales, sum_of, summed_operands
from surgeon.ops.table import Family, Trait, absent_of, family, has, op_name
from surgeon.proof.second_look import carries_nothing, empty_along

TOLERANCE = 1e-9
ROUNDED = 1e-6  # relative: numbers of the recorded run may have been rounded to float32

Value = tuple[Tensor, Mask]
Rescaled = dict[fx.Node, tuple[str, float, float]]  # the name of an argument, as recorded, as it is now


class Reference:
    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: Plan,
        rescaled: Rescaled,
        results: Mapping[fx.Node, Tensor],
        exact: Mapping[fx.Node, Tensor] | None = None,
        leaking: bool = False,
        filled: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.graph, self.plan, self.rescaled, self.results = graph, plan, rescaled, results
        self.exact = exact or {}  # constants of the model's code, not rounded to the recorded dtype
        self.errors: dict[fx.Node, float] = {}  # of the products that were compared, in the order of the run
        self.present: dict[fx.Node, Tensor] = {}  # what is there of them, if it is kept
        self.keeps = False
        self.watch: Callable[[fx.Node, Tensor], None] | None = None  # told of what is present of each value
        self.leaking = leaking  # something is added to what saturating activations give
        # What contractions read -> which of its channels carry nothing; of weights along the summed dim.
        self.hidden: dict[tuple[fx.Node, int], Tensor] = {}
        self.fed = fed_by_inputs(graph)
        self.terms: dict[tuple[fx.Node, int], int] = {}  # of sums: how many entries of a dim are present
        own = dict(named_tensors(model))
        self.tensors = {**graph.tensors, **{n: t for n, t in own.items() if n in graph.owned}}
        self.tensors |= {name: tensor for name, tensor in (filled or {}).items() if name in graph.owned}
        self.values: dict[fx.Node, Any] = {}
        self.last = {n: user for user in graph.fx.nodes for n in user.all_input_nodes}

    def run(self, args: Any, kwargs: Any) -> list[tuple[str, Value]]:
        given = [tensor for _, tensor in tensor_leaves((args, kwargs))]
        unique = list({id(t): t for t in given}.values())
        inputs = iter(unique)
        read = [(said(read), read.node) for read in self.graph.reads if read.node is not None]
        outputs = [*self.graph.outputs, *read]
        keep = {node for _, node in outputs}
        for node in self.graph.fx.nodes:
            if node.op == "placeholder":
                self.values[node] = (next(inputs), ())
            elif node.op == "get_attr":
                self.values[node] = (
                    (self.exact[node], ()) if node in self.exact else self._slot(str(node.target))
                )
            elif node.op == "call_function":
                self.values[node] = self._call(node)
                if node in self.results:
                    self._compare(node)
                self._tell(node)
                for used in node.all_input_nodes:  # free what nobody reads any more
                    if self.last.get(used) is node and used not in keep:
                        self.values.pop(used, None)
        return [(path, self.values[node]) for path, node in outputs]

    def _tell(self, node: fx.Node) -> None:
        value = self.values[node]
        if self.watch is not None and not isinstance(value, list):
            data, mask = value
            self.watch(node, data[masks.full(mask, data.shape)] if mask else data)

    def _compare(self, node: fx.Node) -> None:
        value = self.values[node]
        data, mask = value[0] if isinstance(value, list) else value
        got = self.results[node]
        want = data[masks.full(mask, data.shape)] if mask else data.flatten()
        if self.keeps:
            self.present[node] = want.clone()
            return
        same = want.numel() == got.numel()
        self.errors[node] = distance(str(node), want, (), got.flatten()) if same else math.inf

    def _count_terms(self, node: fx.Node) -> None:
        """Note how many entries of what an op sums over are present."""
        made = sum_of(node, self.fed)
        if made is not None:
            data, mask = self.values[made.value]
            for dim in made.dims:
                counted = masks.counted(mask, data.shape, [dim])
                self.terms[made.value, dim] = int(counted.max()) if counted.numel() else 0

    def unexplained(self) -> tuple[fx.Node, float, float] | None:
        """A number that differs in the small model's code and scales no sum that lost a like share of its
        terms; with what it was and is.
        """
        for node, (name, before, after) in self.rescaled.items():
            near = math.isclose(before, after, rel_tol=ROUNDED)
            if (
                scales(op_name(node), name)
                and not near
                and not follows(node, before, after, self.fed, lambda value, dim: self.terms[value, dim])
            ):
                return node, before, after
        return None

    def _look(self, node: fx.Node) -> None:
        """Note the channels of what an op reads that carry nothing."""
        for used in node.all_input_nodes:
            value = self.values[used]
            if used in self.fed and (used, -1) not in self.hidden and not isinstance(value, list):
                data, mask = value
                if mask and data.numel():
                    self.hidden[used, -1] = carries_nothing(data, mask)
        for used, dim in summed_operands(node):
            data, mask = self.values[used]
            if used not in self.fed and (used, dim) not in self.hidden and masks.varies(mask, [dim]):
                self.hidden[used, dim] = empty_along(data, mask, dim)

    def _slot(self, name: str) -> Value:
        tensor = self.tensors[name].detach()
        data = wide(tensor) if is_narrow(tensor) else tensor.clone()
        mask = []
        for dim, kept in self.plan.kept.get(name, {}).items():
            present = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            present[list(kept)] = True
            mask.append(present.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]))
            data.index_fill_(dim, (~present).nonzero()[:, 0], 0)
        return masks.known_zeroed(data), masks.tidy(mask)

    def _call(self, node: fx.Node) -> Any:
        given = arguments(node)
        if node in self.rescaled:
            given = self._rescale(node, given)
        if self.rescaled:
            self._count_terms(node)
        name = op_name(node)
        if node.target is getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]  # a node and a number
        if family(name) is Family.CONTRACTION:
            self._look(node)
        call = MaskedOp(node, name, given, self.values)
        if "decision" in node.meta and not call.masked:
            taken = replay(node, [nest(a, call.data) for a in given.args], given.kwargs)
            if taken is not None:
                return call.outputs(taken, ())
        with contextlib.nullcontext() if _is_pure(node.target) else Isolation(seed=0):
            result = absent_of(node)(call)
        if has(name, Trait.RESHAPES) or has(name, Trait.PERMUTES):
            (moved,) = node.all_input_nodes
            if masks.is_zeroed(self.values[moved][0]):
                masks.known_zeroed(result[0])
        if self.leaking and has(name, Trait.SATURATES) and result[0].is_floating_point():
            result = result[0] + leak(call.data(next(iter(given.values())))), result[1]
        return (torch.full_like(result[0], DRAWN), result[1]) if draws(name) else result

    def _rescale(self, node: fx.Node, given: Arguments) -> Arguments:
        """Put the small model's number in place of the recorded one."""
        name, _, after = self.rescaled[node]
        number = given[name]
        if not isinstance(number, fx.Node):
            return given.replaced(name, after)
        data, mask = self.values[number]
        self.values[number] = torch.full_like(data, after), mask
        return given


@functools.cache
def _is_pure(target: Any) -> bool:
    """Whether an op is one of torch's that neither writes nor draws, so that its run needs no isolation."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def said(read: Read) -> str:
    """What values that left torch are called among the outputs."""
    return f"values read by {read.how} at {source_line(read.source)}".rstrip()


def distance(path: str, want: Tensor, mask: Mask, got: Tensor) -> float:
    if mask:
        present = masks.full(mask, want.shape)
        if tuple(want.shape) != tuple(got.shape):
            raise ProofError(
                "an output lost entries", where=f"output '{path}'", fix="outputs of the model must stay whole"
            )
        want, got = want[present], got[present]
    if tuple(want.shape) != tuple(got.shape):
        raise ProofError(
            f"an output has shape {tuple(got.shape)} instead of {tuple(want.shape)}", where=f"output '{path}'",
            why="the plan does not fit the model", fix="make the plan anew with surgery.plan(...)",
        )  # fmt: skip
    if not want.numel():
        return 0.0
    if want.is_complex():
        want, got = as_real(want), as_real(got.to(want.dtype))
    want, got = want.to(torch.float64), got.to(torch.float64)
    odd = ~torch.isfinite(want)
    if bool(odd.any()):
        same = torch.where(torch.isnan(want[odd]), torch.isnan(got[odd]), want[odd] == got[odd])
        if not bool(same.all()):
            return math.inf
        want, got = want[~odd], got[~odd]
        if not want.numel():
            return 0.0
    scale = float(want.abs().max())
    difference = float((want - got).abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)
