"""Reference: the original's graph run in float64 on tensors whose removed indices are absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.capture.aliasing import getitem
from surgeon.capture.value_dependent import DRAWN, draws, replay
from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import as_real, named_tensors, tensor_leaves
from surgeon.ops import masks
from surgeon.ops.masked_op import Op, leak, nest, saturates, wide
from surgeon.ops.masked_products import BY_FAMILY, SEMANTICS
from surgeon.ops.masks import Mask
from surgeon.ops.table import Family, family, op_name

TOLERANCE = 1e-9

Value = tuple[Tensor, Mask]
Rescaled = dict[fx.Node, tuple[int | str, float, float]]  # the place of a number, as recorded, as it is now


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
    ) -> None:
        self.graph, self.plan, self.rescaled, self.results = graph, plan, rescaled, results
        self.exact = exact or {}  # constants of the model's code, not rounded to the recorded dtype
        self.inner, self.compared = 0.0, 0
        self.first_bad: fx.Node | None = None
        self.leaking = leaking  # something is added to what saturating activations give
        self.hidden: dict[
            fx.Node, Tensor
        ] = {}  # what contractions read -> which of the present channels are zero throughout
        self.fed = {node for _, node in graph.inputs}  # what the inputs decide
        for node in graph.fx.nodes:
            if not self.fed.isdisjoint(node.all_input_nodes):
                self.fed.add(node)
        own = dict(named_tensors(model))
        self.tensors = {**graph.tensors, **{n: t for n, t in own.items() if n in graph.owned}}
        self.values: dict[fx.Node, Any] = {}
        self.last = {n: user for user in graph.fx.nodes for n in user.all_input_nodes}

    def run(self, args: Any, kwargs: Any) -> list[tuple[str, Value]]:
        given = [tensor for _, tensor in tensor_leaves((args, kwargs))]
        unique = list({id(t): t for t in given}.values())
        inputs = iter(unique)
        keep = {node for _, node in self.graph.outputs}
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
                for used in node.all_input_nodes:  # free what nobody reads any more
                    if self.last.get(used) is node and used not in keep:
                        self.values.pop(used, None)
        return [(path, self.values[node]) for path, node in self.graph.outputs]

    def _compare(self, node: fx.Node) -> None:
        value = self.values[node]
        data, mask = value[0] if isinstance(value, list) else value
        got = self.results[node]
        want = data[masks.full(mask, data.shape)] if mask else data.flatten()
        same = want.numel() == got.numel()
        error = distance(str(node), want, (), got.flatten()) if same else math.inf
        self.compared += 1
        self.inner = max(self.inner, error)
        if not error <= TOLERANCE and self.first_bad is None:
            self.first_bad = node

    def _look(self, node: fx.Node) -> None:
        """Note the channels of what an op reads that are zero throughout."""
        for used in node.all_input_nodes:
            value = self.values[used]
            if used not in self.fed or used in self.hidden or isinstance(value, list):
                continue
            data, mask = value
            others = [d for d in range(data.dim()) if not masks.varies(mask, [d])]
            if mask and data.numel():
                alive = (data != 0).any(dim=others, keepdim=True) if others else data != 0
                self.hidden[used] = masks.full(mask, alive.shape) & ~alive

    def _slot(self, name: str) -> Value:
        tensor = self.tensors[name].detach()
        data = wide(tensor.clone())
        mask = []
        for dim, kept in self.plan.kept.get(name, {}).items():
            present = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            present[list(kept)] = True
            mask.append(present.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]))
        return data, masks.tidy(mask)

    def _call(self, node: fx.Node) -> Any:
        args, kwargs = list(node.args), dict(node.kwargs)
        if node in self.rescaled:
            place, _, after = self.rescaled[node]
            given: Any = kwargs if isinstance(place, str) else args
            number = given[place]
            if isinstance(number, fx.Node):
                data, mask = self.values[number]
                self.values[number] = torch.full_like(data, after), mask
            else:
                given[place] = after
        name = op_name(node)
        if node.target is getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]  # a node and a number
        if family(name) is Family.CONTRACTION:
            self._look(node)
        call = Op(node, name, args, kwargs, self.values)
        if "decision" in node.meta and not call.masked:
            taken = replay(node, [nest(a, call.data) for a in args], kwargs)
            if taken is not None:
                return call.outputs(taken, ())
        result = SEMANTICS.get(name, BY_FAMILY[family(name)])(call)
        if self.leaking and saturates(name) and result[0].is_floating_point():
            result = result[0] + leak(call.data(args[0])), result[1]
        return (torch.full_like(result[0], DRAWN), result[1]) if draws(name) else result


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
