"""Does an exported file compute what the model computes? It runs in ONNX Runtime (CPU) on other sizes and
fresh values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.capture.model_state import output_of
from surgeon.errors import ExportError, SurgeonError
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.tensors import tensor_leaves
from surgeon.onnx import compare as agree
from surgeon.onnx.bf16_to_fp32 import widen
from surgeon.onnx.child_process import try_inputs
from surgeon.onnx.compare import Inputs, batch_size_of
from surgeon.onnx.file import head

ANY_BATCH = "pass dynamic_batch=False, or make forward independent of the batch size (-1 in views)"
_TOLERANCE = {torch.float16: 1e-2}  # of the largest output; all other dtypes:
_DEFAULT_TOLERANCE = 1e-4
_FACTOR = 16  # what rounding may change, as often as what moves with the last bit
_HIGHEST = 0.05  # where rounding alone may change more, a comparison shows nothing
_DRAWS = 3
_SAID = 3  # inputs that a message says the shapes of


def larger(model: nn.Module, inputs: Inputs, proto: Any) -> list[Inputs]:
    """The inputs with twice the size along every dim that the file names, if the model runs on them."""
    dims = [
        {d: dim.dim_param for d, dim in enumerate(item.type.tensor_type.shape.dim) if dim.dim_param}
        for item in proto.graph.input
    ]
    if len(dims) != len(list(tensor_leaves(inputs))) or not any(dims):
        return []
    twice = agree.doubled(inputs, dims)
    try:
        model(*twice[0], **twice[1])
    except Exception:  # noqa: BLE001  # the model's own limits, such as a longest sequence; the report says what was compared
        return []
    return [twice]


Shapes = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a file was compared with its model.

    Attributes:
        how: "as it is", or "in float32" with the same weights.
        error: the largest relative error over outputs and sizes on fresh values.
        limit: what was allowed: more than usual where rounding alone moves the model's outputs so far.
        shapes: of the file's outputs, for each of the sizes.
    """

    how: str
    error: float
    limit: float
    shapes: list[Shapes]


def compare(model: nn.Module, draft: Path, sizes: Sequence[Inputs]) -> Agreement:
    """Compare a file with the model on inputs of several sizes, with fresh values.

    Raises:
        ExportError: the error is above the limit, or ONNX Runtime cannot run the file.
    """
    if not any(p.dtype is torch.bfloat16 for p in model.parameters()):
        return _worst("as it is", model, draft, sizes)
    with contextlib.ExitStack() as stack:
        wide = draft.with_name(f"wide.{draft.name}")
        for suffix in ("", ".data"):
            stack.callback(wide.with_name(wide.name + suffix).unlink, missing_ok=True)
        widen(draft, wide)
        exact = copied(model).float()
        floats = [agree.cast_floats(inputs, torch.float32) for inputs in sizes]
        return _worst("in float32", exact, wide, floats)


def _worst(how: str, model: nn.Module, draft: Path, sizes: Sequence[Inputs]) -> Agreement:
    found = [_gap(model, draft, inputs, seed) for seed, inputs in enumerate(sizes, 1)]
    errors, limits, shapes = zip(*found, strict=True)
    return Agreement(how, max(errors), max(limits), list(shapes))


def _gap(model: nn.Module, draft: Path, inputs: Inputs, seed: int) -> tuple[float, float, Shapes]:
    """The largest relative error over the outputs on fresh values, the largest that was allowed, and the outputs'
    shapes.
    """
    args, kwargs = agree.fresh(inputs, seed)
    batch = batch_size_of(inputs)
    expected = _outputs(model, (args, kwargs), batch)
    try:
        (found,) = try_inputs(draft, [(args, kwargs)])
    except SurgeonError as error:
        fix = "pass dynamic_batch=False, or leave a dim out of dynamic_shapes, if a size is named; another precision if a dtype "
        fix += "is; or try another opset"
        raise ExportError(
            "ONNX Runtime cannot run the exported file",
            where=f"{_shapes_of((args, kwargs))}, {error.where}".rstrip(", "),
            why=error.why or error.what,
            fix=fix,
        ) from error
    if len(found) != len(expected):
        fix = "return each output once, as a tensor or a tuple or dict of tensors"
        raise ExportError(f"the file has {len(found)} outputs and the model {len(expected)}", fix=fix)
    errors = [agree.relative_error(a, t.numpy()) for (_, t), a in zip(expected, found, strict=True)]
    usual = [_TOLERANCE.get(tensor.dtype, _DEFAULT_TOLERANCE) for _, tensor in expected]
    limits = usual
    if any(not gap <= limit for gap, limit in zip(errors, usual, strict=True)):
        moved = _rounding(model, (args, kwargs), expected, batch)
        limits = [max(limit, min(_FACTOR * m, _HIGHEST)) for limit, m in zip(usual, moved, strict=True)]
    for (path, _), gap, limit, least in zip(expected, errors, limits, usual, strict=True):
        if not gap <= limit:
            measured = f", {_FACTOR} times what rounding changes in the model" if limit > least else ""
            raise ExportError(
                f"the exported file computes something else: output differs by {gap:.1e} "
                f"(at most {limit:.0e}{measured} is allowed)",
                where=f"output '{path}', {_shapes_of((args, kwargs))}",
                why="the exporter or ONNX Runtime changed the model's arithmetic, or forward is random or fixes a size",
                fix="export with dynamic_batch=False (or without the dim in dynamic_shapes), fuse=False or another opset; "
                "compare op by op if it stays",
            )
    shapes = [array.shape for array in found]
    return max(errors, default=0.0), max(limits, default=_DEFAULT_TOLERANCE), shapes


def _shapes_of(inputs: Inputs) -> str:
    """Sizes on which the two were run, in a message."""
    shapes = [tuple(tensor.shape) for _, tensor in tensor_leaves(inputs)]
    more = f" and {len(shapes) - _SAID} more" if len(shapes) > _SAID else ""
    return f"batch {batch_size_of(inputs)}, inputs of shape {', '.join(map(str, shapes[:_SAID]))}{more}"


def _outputs(model: nn.Module, inputs: Inputs, batch: int) -> list[tuple[str, Tensor]]:
    try:
        output = output_of(model, *inputs)
    except Exception as error:  # the model's own code: anything may come out of it, and all of it is reported
        why = f"{type(error).__name__}: {head(str(error))}"
        raise ExportError(
            f"the model itself does not run on a batch of {batch}", why=why, fix=ANY_BATCH
        ) from error
    return [(path, tensor.detach().cpu()) for path, tensor in tensor_leaves(output)]


def _rounding(
    model: nn.Module, inputs: Inputs, expected: Sequence[tuple[str, Tensor]], batch: int
) -> list[float]:
    """How far each output moves if each number of the model and of its inputs moves in the last bit."""
    worst = [0.0] * len(expected)
    for seed in range(_DRAWS):
        move = partial(_moved, torch.Generator().manual_seed(seed))
        twin = copied(model)
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.copy_(move(tensor))
        found = _outputs(twin, pytree.tree_map_only(Tensor, move, inputs), batch)
        gaps = (
            agree.relative_error(a.numpy(), b.numpy()) for (_, a), (_, b) in zip(found, expected, strict=True)
        )
        worst = [max(pair) for pair in zip(worst, gaps, strict=True)]
    return worst


def _moved(generator: torch.Generator, tensor: Tensor) -> Tensor:
    """The numbers moved in the last bit, up or down at random; whole numbers as they are."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    return tensor * (1 + up.to(tensor.dtype) * torch.finfo(tensor.dtype).eps)
