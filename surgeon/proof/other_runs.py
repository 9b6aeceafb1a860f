"""Runs that were not recorded: a second call, and inputs of other sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.model_state import output_of, quiet_run
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.graph import Graph
from surgeon.graph.nests import map_tensors
from surgeon.graph.tensors import named_tensors, tensor_leaves
from surgeon.ops.masked_op import wide
from surgeon.proof.reference import TOLERANCE, distance

_ROUNDED = 1e-4  # relative difference that is allowed in float32
_LARGEST = 1 << 22  # entries of an input that is made larger


def written_state(model: nn.Module, graph: Graph) -> set[str]:
    """Names of tensors of the model that its forward writes to."""
    twin = copied(model)
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(twin)}
    with torch.no_grad(), quiet_run(twin, seed=0, isolated=False):
        output_of(twin, graph.args, dict(graph.kwargs))
    after = dict(named_tensors(twin))
    return {
        name
        for name, tensor in before.items()
        if name not in after or tensor.shape != after[name].shape or not torch.equal(tensor, after[name])
    }


def answers_inputs(model: nn.Module, graph: Graph) -> bool:
    """Whether any output is another one for other inputs; taken for granted where inputs are whole numbers alone."""
    given = (graph.args, dict(graph.kwargs))
    if not any(tensor.is_floating_point() for _, tensor in tensor_leaves(given)):
        return True
    drawn = map_tensors(given, lambda t: 10 * _drawn(t.detach()) if t.is_floating_point() else t)
    results = []
    for args, kwargs in (given, drawn):
        twin = copied(model)
        with torch.no_grad(), quiet_run(twin, seed=0, isolated=False):
            results.append(list(tensor_leaves(output_of(twin, args, kwargs))))
    return any(
        a.shape != b.shape or not torch.equal(a, b) for (_, a), (_, b) in zip(*results, strict=False)
    ) or len(results[0]) != len(results[1])


def first_difference(model: nn.Module, small: nn.Module, graph: Graph, exact: Mapping[str, Tensor]) -> str:
    """In which run two models differ that give the same in the recorded one; "" if none was found. Sizes at which the original
    does not run are left out.

    Args:
        exact: numbers to take in place of those of some of the small model's tensors, which are rounded.
    """
    given = (graph.args, dict(graph.kwargs))
    to, tolerance = _precision(model, given)
    twins = _twin(model, {}, to), _twin(small, exact, to)
    for number in range(2):
        if _differ(*twins, map_tensors(given, lambda t: to(t.detach())), tolerance):
            return "a second call" if number else "the recorded call"
    for made, said in _resized(given):
        if _differ(*twins, map_tensors(map_tensors(given, made), to), tolerance):
            return said
    return ""


def _precision(model: nn.Module, given: Any) -> tuple[Callable[[Tensor], Tensor], float]:
    """How tensors are converted, and the relative difference that is allowed: float64, or as they are where the model's code
    makes tensors of another dtype that do not fit.
    """
    args, kwargs = map_tensors(given, lambda t: wide(t.detach()))
    twin = _twin(model, {}, wide)
    try:
        with torch.no_grad(), quiet_run(twin, seed=0, isolated=False):
            output_of(twin, args, kwargs)
    except Exception:  # noqa: BLE001  # the model's code, which may raise anything about dtypes
        return (lambda tensor: tensor), _ROUNDED
    return wide, TOLERANCE


def _twin(model: nn.Module, exact: Mapping[str, Tensor], to: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose tensors are converted."""
    with torch.no_grad():
        twin: nn.Module = copied(model)._apply(to)
        tensors = dict(named_tensors(twin))
        for name, tensor in tensors.items():  # weights that hooks make, which are no parameters
            owner, _, attribute = name.rpartition(".")
            held = twin.get_submodule(owner).__dict__
            if attribute in held:
                held[attribute] = to(tensor)
        for name, tensor in exact.items():
            tensors[name].copy_(tensor)
    return twin


def _differ(model: nn.Module, small: nn.Module, inputs: Any, tolerance: float) -> bool:
    args, kwargs = inputs
    outputs = []
    for module in (model, small):
        try:
            with torch.no_grad(), quiet_run(module, seed=0, isolated=False):
                outputs.append(list(tensor_leaves(output_of(module, args, kwargs))))
        except Exception:  # noqa: BLE001  # a size that the model's code does not take, whatever it raises
            return bool(outputs)  # the small model alone fails
    wanted, got = outputs
    if [path for path, _ in wanted] != [path for path, _ in got]:
        return True
    return any(
        a.shape != b.shape or not distance(path, a, (), b) <= tolerance
        for (path, a), (_, b) in zip(wanted, got, strict=True)
    )


def _resized(given: Any) -> Iterator[tuple[Callable[[Tensor], Tensor], str]]:
    """Makers of inputs with one more sample, and with other sizes in place of each size of the other dims."""
    leaves = [tensor for _, tensor in tensor_leaves(given)]
    changes = [(0, size, size + 1) for size in {t.shape[0] for t in leaves if t.dim()}]
    others = sorted({size for t in leaves for size in t.shape[1:]})
    changes += [(1, size, new) for size in others for new in (size + 1, size + 2, 2 * size + 2)]
    for first, size, new in changes:

        def resized(tensor: Tensor, first: int = first, size: int = size, new: int = new) -> Tensor:
            dims = range(tensor.dim()) if first else range(min(1, tensor.dim()))
            for dim in dims:
                if dim >= first and tensor.shape[dim] == size:
                    places = torch.arange(new, device=tensor.device) % size
                    tensor = tensor.index_select(dim, places)
            return _drawn(tensor.detach())

        if max(resized(t).numel() for t in leaves) <= _LARGEST:
            where = "samples" if not first else "places"
            yield resized, f"inputs with {new} {where} in place of {size}"


def _drawn(tensor: Tensor) -> Tensor:
    """Numbers of floating point drawn anew."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
