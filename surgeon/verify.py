"""verify(model, small, plan, inputs) -> Proof: the small model computes what the cut original should.

The reference is the original's recorded graph with all its channels, run in float64 on tensors whose removed indices are
absent: whoever sums over channels reads absent ones as zero, and whoever normalises over channels does so over those that are
present. Nothing here knows of ids, groups or slicing; only the graph and `plan.kept` enter, so a wrong tie, a wrong slice or a
wrongly changed size shows up as a difference.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon import masks
from surgeon._views import getitem
from surgeon.capture import capture, named_tensors, quiet_run
from surgeon.errors import ProofError
from surgeon.graph import Graph, tensor_leaves, where
from surgeon.masks import Mask
from surgeon.plan import Plan
from surgeon.rules.registry import Family, family, op_name

TOLERANCE = 1e-9
_HALVES = (torch.float32, torch.float16, torch.bfloat16)
_OPTIONAL = {"clone", "alias", "detach", "contiguous", "lift_fresh", "empty", "as_strided"}  # compute nothing
_KEEP = 1 << 27  # entries of the small model's inner results that are kept for comparison (1 GiB)


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the small model is from the masked reference.

    Attributes:
        errors: max |small - reference| / max |reference| in float64, per output.
        inner: the same, the largest over the results of all contractions (convolutions, matrix products, attention). It counts
            where an output hides what happened before it, as a classifier that was initialised to zero does.
        compared: how many contractions were compared; 0 if the two runs do not line up op by op.
        tolerance: the error up to which the cut counts as right.
        rescaled: constants that the model derives from a width, such as 1/sqrt(head_dim): (place, before, after). The
            reference uses the value after the cut.
    """

    errors: Mapping[str, float]
    tolerance: float
    inner: float = 0.0
    compared: int = 0
    rescaled: tuple[tuple[str, float, float], ...] = ()

    @property
    def error(self) -> float:
        """The largest error of all outputs and inner results."""
        return max(*self.errors.values(), self.inner)

    def __str__(self) -> str:
        text = f"proof: max relative error {self.error:.1e} in float64 over {len(self.errors)} outputs and {self.compared} products"
        return text + (f"; {len(self.rescaled)} width-dependent constants follow the new widths" if self.rescaled else "")


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    graph: Graph | None = None,
    tolerance: float = TOLERANCE,
) -> Proof:
    """Prove the surgery, in float64, eval mode. Takes about two forward passes of the original.

    Args:
        model: the original.
        small: what `plan.apply(model)` gave, before any training or recovery.
        plan: the plan.
        example_inputs: as for `capture`; floating-point inputs are replaced by random ones of the same shape unless the
            model's control flow reads values.
        graph: the recorded run of `model`, if there is one already.

    Raises:
        ProofError: an output differs by more than `tolerance`, or cannot be compared.
    """
    graph = graph or capture(model, example_inputs)
    args, kwargs = _double((graph.args, graph.kwargs), random=not _reads_values(graph))
    outputs, trace = _run_small(small, args, kwargs)
    with _float64():
        steps = _line_up(graph, trace)
        rescaled = _rescaled(graph, steps, plan)
        run = _Reference(model, graph, plan, rescaled, {n: step.result for n, step in steps.items() if step.result is not None})
        reference = run.run(args, kwargs)
    if [path for path, _ in reference] != [path for path, _ in outputs]:
        raise ProofError(
            "the small model returns other outputs than the original",
            why=f"{[p for p, _ in outputs]} instead of {[p for p, _ in reference]}",
        )
    errors: dict[str, float] = {}
    for (path, (want, mask)), (_, got) in zip(reference, outputs, strict=True):
        errors[path] = _error(path, want, mask, got)
    said = tuple((where(node), before, after) for node, (_, before, after) in rescaled.items())
    proof = Proof(errors, tolerance, run.inner, run.compared, said)
    if not proof.error <= tolerance:
        worst = max(errors, key=lambda p: errors[p] if errors[p] == errors[p] else math.inf)
        raise ProofError(
            f"the small model does not compute what the plan says: relative error {proof.error:.2e} (allowed {tolerance:.0e})",
            where=where(run.first_bad) if run.first_bad is not None else f"output '{worst}'",
            why="the plan removes different channels from tensors that belong together, or the small model was changed since",
            fix="make the plan with surgery.plan(...); if it was, please report the model: this is a bug in surgeon",
        )
    return proof


def _error(path: str, want: Tensor, mask: Mask, got: Tensor) -> float:
    if mask:
        present = masks.full(mask, want.shape)
        if tuple(want.shape) != tuple(got.shape):
            raise ProofError("an output lost entries", where=f"output '{path}'", fix="outputs of the model must stay whole")
        want, got = want[present], got[present]
    if tuple(want.shape) != tuple(got.shape):
        raise ProofError(
            f"an output has shape {tuple(got.shape)} instead of {tuple(want.shape)}", where=f"output '{path}'",
            why="the plan does not fit the model", fix="make the plan anew with surgery.plan(...)",
        )  # fmt: skip
    if not want.numel():
        return 0.0
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
    return difference / scale if scale else (math.inf if difference else 0.0)


# -- the small model ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _reads_values(graph: Graph) -> bool:
    names = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select"}
    return any(node.op == "call_function" and op_name(node) in names for node in graph.fx.nodes)


def _double(tree: Any, random: bool) -> Any:
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}

    def convert(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in made:
                made[id(item)] = fresh(item)
            return made[id(item)]
        if isinstance(item, dict):
            return {k: convert(v) for k, v in item.items()}
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*[convert(v) for v in item])
        return type(item)(convert(v) for v in item) if isinstance(item, list | tuple) else item

    def fresh(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if not random:
            return tensor.detach().to(torch.float64)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)

    return convert(tree)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One op of the small model's run: its name, the numbers among its arguments, its result if it is a contraction."""

    name: str
    constants: tuple[float, ...]
    result: Tensor | None


class _Upgrade(TorchDispatchMode):
    """Runs code that asks for float32 by name in float64, and notes the constants of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[_Step] = []
        self.room = _KEEP

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = func(*_wide(args), **{k: _wide(v) for k, v in (kwargs or {}).items()})
        if name.rstrip("_") not in _OPTIONAL:
            self.trace.append(_Step(name.rstrip("_"), _constants(args), self._kept(name, result)))
        return result

    def _kept(self, name: str, result: Any) -> Tensor | None:
        first = result[0] if isinstance(result, list | tuple) and result else result
        if family(name) is not Family.CONTRACTION or not isinstance(first, Tensor) or first.numel() > self.room:
            return None
        self.room -= first.numel()
        return first.clone()


def _wide(item: Any) -> Any:
    if item in _HALVES if isinstance(item, torch.dtype) else False:
        return torch.float64
    return tuple(map(_wide, item)) if isinstance(item, tuple) else item


def _constants(args: Any) -> tuple[float, ...]:
    return tuple(float(a) for a in args if isinstance(a, int | float) and not isinstance(a, bool))


def _run_small(small: nn.Module, args: Any, kwargs: Any) -> tuple[list[tuple[str, Tensor]], list[_Step]]:
    twin = copy.deepcopy(small).to(torch.float64)
    for name, tensor in named_tensors(twin):
        owner, _, attribute = name.rpartition(".")
        module = twin.get_submodule(owner)
        if attribute in module.__dict__ and tensor.is_floating_point():
            module.__dict__[attribute] = tensor.to(torch.float64)
    mode = _Upgrade()
    with _float64(), quiet_run(twin, seed=0), mode:
        try:
            output = twin(*args, **kwargs)
        except Exception as error:
            raise ProofError(
                f"the small model does not run: {type(error).__name__}: {error}",
                why="the plan does not fit the model's code",
                fix="make the plan anew with surgery.plan(...)",
            ) from error
    return list(tensor_leaves(output)), mode.trace


def _line_up(graph: Graph, trace: list[_Step]) -> dict[fx.Node, _Step]:
    """The steps of the small model's run by the node that they belong to; {} if the runs differ in their ops."""
    calls = [c.node for c in graph.calls if op_name(c.node) not in _OPTIONAL]
    alike = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}
    if len(calls) != len(trace):
        return {}
    for node, step in zip(calls, trace, strict=True):
        if alike.get(step.name, step.name) != alike.get(op_name(node), op_name(node)):
            return {}
    return dict(zip(calls, trace, strict=True))


def _rescaled(graph: Graph, steps: Mapping[fx.Node, _Step], plan: Plan) -> dict[fx.Node, tuple[int, float, float]]:
    """Constants that differ between the two runs by a power of a share that the plan keeps: node -> (position, old, new)."""
    shares: set[float] = set()
    for name, dims in plan.kept.items():
        for dim, kept in dims.items():
            shares.add(len(kept) / graph.tensors[name].shape[dim])
    found: dict[fx.Node, tuple[int, float, float]] = {}
    for node, step in steps.items():
        if family(step.name) is not Family.ELEMENTWISE:
            continue
        places = [i for i, a in enumerate(node.args) if isinstance(a, int | float) and not isinstance(a, bool)]
        for place, after in zip(places, step.constants, strict=False):
            before = float(node.args[place])  # type: ignore[arg-type]  # a number, tested above
            if before > 0 and after > 0 and abs(after / before - 1) > 1e-12 and _explained(after / before, shares):
                found[node] = (place, before, after)
    return found


def _explained(ratio: float, shares: set[float]) -> bool:
    return any(abs(ratio / share**power - 1) < 1e-9 for share in shares for power in (-1, -0.5, -0.25, 0.25, 0.5, 1))


# -- the masked reference -------------------------------------------------------------------------------------------

Value = tuple[Tensor, Mask]


class _Reference:
    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: Plan,
        rescaled: Mapping[fx.Node, tuple[int, float, float]],
        results: Mapping[fx.Node, Tensor],
    ) -> None:
        self.graph, self.plan, self.rescaled, self.results = graph, plan, rescaled, results
        self.inner, self.compared = 0.0, 0
        self.first_bad: fx.Node | None = None
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
                self.values[node] = self._slot(str(node.target))
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
        error = _error(str(node), want, (), got.flatten()) if same else math.inf
        self.compared += 1
        self.inner = max(self.inner, error)
        if not error <= TOLERANCE and self.first_bad is None:
            self.first_bad = node

    def _slot(self, name: str) -> Value:
        tensor = self.tensors[name].detach()
        data = tensor.to(torch.float64) if tensor.is_floating_point() else tensor.clone()
        mask = []
        for dim, kept in self.plan.kept.get(name, {}).items():
            present = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            present[list(kept)] = True
            mask.append(present.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]))
        return data, masks.tidy(mask)

    def _call(self, node: fx.Node) -> Any:
        args = list(node.args)
        if node in self.rescaled:
            place, _, after = self.rescaled[node]
            args[place] = after
        name = op_name(node)
        if node.target is getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]  # a node and a number
        call = _Call(node, name, args, dict(node.kwargs), self.values)
        return _SEMANTICS.get(name, _BY_FAMILY[family(name)])(call)


class _Call:
    """One op at work: its arguments as data, as masks, or as zeroed data."""

    def __init__(self, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any], values: Mapping[fx.Node, Any]) -> None:
        self.node, self.name, self.args, self.kwargs, self.values = node, name, args, kwargs, values

    def data(self, item: Any) -> Any:
        return self.values[item][0] if isinstance(item, fx.Node) else item

    def mask(self, item: Any) -> Mask:
        return self.values[item][1] if isinstance(item, fx.Node) else ()

    def zeroed(self, item: Any) -> Any:
        return masks.zeroed(*self.values[item]) if isinstance(item, fx.Node) else item

    def run(self, read: Callable[[Any], Any]) -> Any:
        """The op on its arguments as `read` gives them."""
        args = [_nest(a, read) for a in self.args]
        kwargs = {k: _wide(_nest(v, read)) for k, v in self.kwargs.items()}
        return self.op(*map(_wide, args), **kwargs)

    @property
    def op(self) -> Any:
        """The op itself; views as reshapes, because the reference's layouts in memory may differ."""
        return torch.reshape if self.name in ("view", "_unsafe_view", "_reshape_alias") else self.node.target

    @property
    def masked(self) -> bool:
        return any(self.values[n][1] for n in self.node.all_input_nodes if isinstance(self.values[n][1], tuple))

    def outputs(self, result: Any, mask: Mask) -> Any:
        """The result with its mask; further outputs (indices, statistics) share it where their shape allows."""
        if isinstance(result, list | tuple):
            return [(r, mask if i == 0 or (isinstance(r, Tensor) and r.shape == result[0].shape) else ()) for i, r in enumerate(result)]
        return result, mask


def _nest(item: Any, read: Callable[[Any], Any]) -> Any:
    if isinstance(item, list | tuple):
        return type(item)(_nest(x, read) for x in item)
    return read(item)


def _elementwise(call: _Call) -> Any:
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    factors = [f for n in call.node.all_input_nodes for f in masks.aligned(call.mask(n), first.dim())]
    return call.outputs(result, masks.tidy(factors))


def _batch_norm(call: _Call) -> Any:
    result = call.run(call.data)
    ndim = result[0].dim()
    factors = list(call.mask(call.args[0]))
    for vector in call.args[1:5]:
        factors += [f.reshape(1, -1, *(1,) * (ndim - 2)) for f in call.mask(vector)]
    return call.outputs(result, masks.tidy(factors))


def _prelu(call: _Call) -> Any:
    x, weight = call.args[:2]
    result = call.run(call.data)
    wide = [f if f.dim() == result.dim() else f.reshape(1, -1, *(1,) * (result.dim() - 2)) for f in call.mask(weight)]
    return result, masks.tidy([*call.mask(x), *wide])


_TWO = {"slice_scatter", "select_scatter", "diagonal_scatter"}


def _movement(call: _Call) -> Any:
    result = call.run(call.data)
    if not call.masked:
        return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())
    exact = call.name not in ("permute", "t", "transpose", "unsqueeze", "expand", "slice", "select")
    first = call.args[0]
    if isinstance(first, list | tuple):  # cat, stack: presence as one tensor per operand
        parts = [masks.full(call.mask(n), call.data(n).shape) for n in first]
        both = call.op(parts, *call.args[1:], **call.kwargs)
        return result, masks.tidy([masks.compress(both, exact=True)])
    rest = [_nest(a, call.data) for a in call.args[1:]]
    if call.name in _TWO:
        parts = [masks.full(call.mask(n), call.data(n).shape) for n in call.args[:2]]
        both = call.op(*parts, *rest[1:])
        return result, masks.tidy([masks.compress(both, exact=True)])
    if call.name == "constant_pad_nd":  # what padding adds is nobody's: present unless it meets something absent
        rest = [rest[0], 1]
    shape = call.data(first).shape
    kwargs = {k: _nest(v, call.data) for k, v in call.kwargs.items()}

    def op(factor: Tensor) -> Any:
        return call.op(factor, *rest, **kwargs)

    if isinstance(result, list | tuple):
        found = [[masks.compress(part, exact=True) for part in op(f.expand(shape))] for f in call.mask(first)]
        return [(r, masks.tidy(f[i] for f in found)) for i, r in enumerate(result)]
    return result, masks.moved(call.mask(first), shape, op, exact)


def _factory(call: _Call) -> Any:
    return call.outputs(call.run(call.data), ())


def _product(call: _Call) -> Any:
    """mm and kin: absent entries count as zero; an output is present if its row and its column are."""
    result = call.run(call.zeroed)
    bias, left, right = (None, *call.args[:2]) if call.name in ("mm", "bmm", "mv", "dot") else call.args[:3]
    rows = masks.any_along(call.mask(left), [call.data(left).dim() - 1])
    if call.name in ("mv", "addmv", "dot"):
        return result, tuple(f.squeeze(-1) for f in rows) if call.name != "dot" else ()
    columns = masks.any_along(call.mask(right), [call.data(right).dim() - 2])
    extra = masks.aligned(call.mask(bias), result.dim()) if bias is not None else ()
    if call.name == "addbmm":
        rows, columns = masks.any_along(rows, [0], keepdim=False), masks.any_along(columns, [0], keepdim=False)
    return result, masks.tidy([*rows, *columns, *extra])


def _linear(call: _Call) -> Any:
    result = call.run(call.zeroed)
    x, weight = call.args[:2]
    rows = masks.any_along(call.mask(x), [call.data(x).dim() - 1])
    filters = masks.any_along(call.mask(weight), [1], keepdim=False)
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return result, masks.tidy([*rows, *masks.aligned(filters, result.dim()), *masks.aligned(call.mask(bias), result.dim())])


def _convolution(call: _Call) -> Any:
    x, weight, bias = call.args[:3]
    result = call.run(call.zeroed)
    groups, w = call.args[8], call.data(weight)
    present = masks.full(call.mask(weight), w.shape)
    if call.args[6]:  # transposed: [C, O/g, ...], each group its own block of rows
        filters = present.reshape(groups, w.shape[0] // groups, *w.shape[1:]).flatten(3).any(dim=3).any(dim=1).flatten()
    else:
        filters = present.flatten(1).any(dim=1)
    if masks.varies(call.mask(x), range(2, result.dim())):
        raise _refusal(call, "presence varies over spatial dims")
    batch = masks.any_along(call.mask(x), range(1, result.dim()))
    wide = filters.reshape(1, -1, *(1,) * (result.dim() - 2))
    vector = [f.reshape(wide.shape) for f in call.mask(bias)]
    return result, masks.tidy([wide, *vector, *batch])


def _attention(call: _Call) -> Any:
    q, k, v = call.args[:3]
    parts = [call.zeroed(n) for n in (q, k, v)]
    name = call.name
    bias = call.kwargs.get("attn_mask") if "efficient" not in name else call.args[3]
    causal_at = 5 if "efficient" in name else 4
    causal = bool(call.args[causal_at]) if len(call.args) > causal_at else bool(call.kwargs.get("is_causal", False))
    scale = call.kwargs.get("scale")
    if scale is None:  # the op derives it from the head dim, so from the dims that are present
        count = int(masks.counted(call.mask(q), parts[0].shape, [3]).max()) if call.mask(q) else parts[0].shape[3]
        scale = 1 / math.sqrt(count)
    logits = parts[0] @ parts[1].transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + call.data(bias).to(logits.dtype)
    if causal:
        n, m = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(n, m, dtype=torch.bool).tril().logical_not(), -math.inf)
    result = torch.softmax(logits, dim=-1) @ parts[2]
    rows = masks.any_along(call.mask(q), [3])
    columns = masks.any_along(call.mask(v), [2])
    rest = [(None, ())] * (len(call.node.meta["spec"]) - 1)
    return [(result, masks.tidy([*rows, *columns])), *rest]


def _embedding(call: _Call) -> Any:
    result = call.run(call.data)
    if masks.varies(call.mask(call.args[0]), [0]):
        raise _refusal(call, "rows of an embedding were removed")
    return result, tuple(f.reshape((1,) * (result.dim() - 1) + (-1,)) for f in call.mask(call.args[0]))


def _dims(call: _Call, position: int = 1) -> list[int]:
    ndim = call.data(call.args[0]).dim()
    names = [a.name for a in call.node.target._schema.arguments]  # type: ignore[union-attr]  # an OpOverload
    bound = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    dims = bound.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return [d % ndim for d in dims] if dims else list(range(ndim))


def _reduction(call: _Call) -> Any:
    """Sums read absent entries as zero, means and variances count the present ones, extrema skip the absent ones."""
    x = call.args[0]
    data, mask = call.values[x]
    dims = _dims(call)
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    keep = first.dim() == data.dim()
    if masks.varies(mask, dims):
        count = masks.counted(mask, data.shape, dims)
        zero = masks.zeroed(data, mask)
        name = call.name
        if name in ("sum", "nansum"):
            result = zero.sum(dims, keepdim=keep)
        elif name == "mean":
            result = zero.sum(dims, keepdim=True) / count
            result = result if keep else result.squeeze(dims)
        elif name in ("amax", "amin"):
            worst = -math.inf if name == "amax" else math.inf
            filled = data.masked_fill(~masks.full(mask, data.shape), worst)
            result = call.op(filled, *call.args[1:], **call.kwargs)
        elif name in ("norm", "linalg_vector_norm"):
            result = call.run(lambda item: zero if item is x else call.data(item))
        elif name in ("var", "var_mean", "std", "std_mean"):
            result = _variance(call, zero, mask, count, dims, keep)
        else:
            raise _refusal(call, "it runs over dims that lost entries")
    passed = masks.any_along(mask, dims, keepdim=keep)
    if isinstance(result, list | tuple):
        return [(r, passed) for r in result]
    return result, passed


def _variance(call: _Call, zero: Tensor, mask: Mask, count: Tensor, dims: list[int], keep: bool) -> Any:
    correction = call.kwargs.get("correction", 1)
    correction = 1 if correction is None else correction
    if len(call.args) > 2 and isinstance(call.args[2], bool):
        correction = int(call.args[2])
    mean = zero.sum(dims, keepdim=True) / count
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / (count - correction).clamp_min(0)
    value = spread.sqrt() if call.name.startswith("std") else spread
    value, mean = (value, mean) if keep else (value.squeeze(dims), mean.squeeze(dims))
    return (value, mean) if call.name.endswith("_mean") else value


def _softmax(call: _Call) -> Any:
    x, dim = call.args[0], call.args[1] % call.data(call.args[0]).dim()
    data, mask = call.values[x]
    if masks.varies(mask, [dim]):
        data = data.masked_fill(~masks.full(mask, data.shape), -math.inf)
        log = "log" in call.name
        return (torch.log_softmax(data, dim) if log else torch.softmax(data, dim)), mask
    return call.run(call.data), mask


def _layer_norm(call: _Call) -> Any:
    x, shape = call.args[:2]
    data, mask = call.values[x]
    rms = "rms" in call.name
    weight, bias, eps = (call.args[2], None, call.args[3]) if rms else call.args[2:5]
    dims = list(range(data.dim() - len(shape), data.dim()))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    result = _normalised(data, mask, dims, eps, center=not rms)
    factors = list(mask)
    if weight is not None:
        result = result * call.data(weight)
        factors += masks.aligned(call.mask(weight), data.dim())
    if bias is not None:
        result = result + call.data(bias)
        factors += masks.aligned(call.mask(bias), data.dim())
    tuple_out = isinstance(call.node.meta["spec"], tuple)
    return [(result, masks.tidy(factors)), (None, ()), (None, ())] if tuple_out else (result, masks.tidy(factors))


def _normalised(data: Tensor, mask: Mask, dims: list[int], eps: float, center: bool = True) -> Tensor:
    count = masks.counted(mask, data.shape, dims) if mask else math.prod(data.shape[d] for d in dims)
    zero = masks.zeroed(data, mask)
    mean = zero.sum(dims, keepdim=True) / count if center else torch.zeros((), dtype=data.dtype)
    spread = masks.zeroed((zero - mean) ** 2, mask).sum(dims, keepdim=True) / count
    return (zero - mean) / torch.sqrt(spread + eps)


def _group_norm(call: _Call) -> Any:
    x, weight, bias = call.args[:3]
    groups, eps = call.args[6], call.args[7]
    data, mask = call.values[x]
    cut = (data.shape[0], groups, data.shape[1] // groups, *data.shape[2:])
    grid = masks.moved(mask, data.shape, lambda f: f.contiguous().reshape(cut), exact=True)
    result = _normalised(data.reshape(cut), grid, list(range(2, len(cut))), eps).reshape(data.shape)
    factors = list(mask)
    for vector, scale in ((weight, True), (bias, False)):
        if vector is not None:
            wide = (1, -1, *(1,) * (data.dim() - 2))
            value = call.data(vector).reshape(wide)
            result = result * value if scale else result + value
            factors += [f.reshape(wide) for f in call.mask(vector)]
    return [(result, masks.tidy(factors)), (None, ()), (None, ())]


def _window(call: _Call) -> Any:
    """Pooling and resampling: batch and channels pass."""
    x = call.args[0]
    data, mask = call.values[x]
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    moved_dims = [d for d in range(data.dim()) if d >= data.dim() - (3 if "3d" in call.name else 1 if "1d" in call.name else 2)]
    if masks.varies(mask, moved_dims) or first.dim() != data.dim():
        raise _refusal(call, "it runs over dims that lost entries")
    return call.outputs(result, mask)


def _whole(call: _Call) -> Any:
    """Ops that pick, order or do anything else: fine along dims that are whole."""
    if call.name in ("max", "min") and isinstance(call.args[1] if len(call.args) > 1 else None, fx.Node):
        return _elementwise(call)
    x = call.args[0] if call.args else None
    if isinstance(x, fx.Node) and call.masked and len(call.node.all_input_nodes) == 1 and family(call.name) is Family.REDUCTION:
        data, mask = call.values[x]
        dims = _dims(call)
        if not masks.varies(mask, dims):
            result = call.run(call.data)
            first = result[0] if isinstance(result, list | tuple) else result
            passed = masks.any_along(mask, dims, keepdim=first.dim() == data.dim())
            return [(r, passed) for r in result] if isinstance(result, list | tuple) else (result, passed)
    if call.masked:
        raise _refusal(call, "it reads a tensor that lost entries, and the proof does not know how")
    result = call.run(call.data)
    return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())


def _refusal(call: _Call, why: str) -> ProofError:
    return ProofError(
        f"the cut cannot be proved at op {call.name}", where=where(call.node), why=why,
        fix="keep the layer with ignore=[...], or report the model: a rule is missing",
    )  # fmt: skip


_BY_FAMILY: Mapping[Family, Callable[[_Call], Any]] = {
    Family.MOVEMENT: _movement,
    Family.ELEMENTWISE: _elementwise,
    Family.CONTRACTION: _product,
    Family.REDUCTION: _whole,
    Family.FACTORY: _factory,
    Family.OPAQUE: _whole,
}

_REDUCTIONS = "mean sum nansum amax amin var std var_mean std_mean norm linalg_vector_norm".split()
_WINDOWS = """max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d avg_pool1d avg_pool2d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d replication_pad3d""".split()
_ATTENTIONS = """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
_scaled_dot_product_fused_attention_overrideable""".split()
_NORMS = """native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
_batch_norm_no_update""".split()

_SEMANTICS: Mapping[str, Callable[[_Call], Any]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys(_NORMS, _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("_prelu_kernel", "prelu"), _prelu),
    "native_group_norm": _group_norm,
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": _linear,
    "embedding": _embedding,
}
