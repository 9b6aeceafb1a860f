"""Does an exported file compute what the model computes? It runs in ONNX Runtime (CPU) on other sizes and
fresh values.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.capture.model_state import output_of
from surgeon.errors import ExportError
from surgeon.graph.tensors import tensor_leaves
from surgeon.onnx import compare as agree
from surgeon.onnx.bf16_to_fp32 import widen
from surgeon.onnx.compare import Inputs, batch_size_of
from surgeon.onnx.file import head

ANY_BATCH = "pass dynamic_batch=False, or make forward independent of the batch size (-1 in views)"
_TOLERANCE = {torch.float16: 1e-2}  # of the largest output; all other dtypes:
_DEFAULT_TOLERANCE = 1e-4


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


def compare(model: nn.Module, draft: Path, sizes: Sequence[Inputs]) -> tuple[str, float]:
    """How the file was run, and the largest relative error over outputs and sizes on fresh values.

    Raises:
        ExportError: it is above the tolerance, or ONNX Runtime cannot run the file.
    """
    if not any(p.dtype is torch.bfloat16 for p in model.parameters()):
        return "as it is", max(_gap(model, draft, inputs, seed) for seed, inputs in enumerate(sizes, 1))
    with contextlib.ExitStack() as stack:
        wide = draft.with_name(f"wide.{draft.name}")
        for suffix in ("", ".data"):
            stack.callback(wide.with_name(wide.name + suffix).unlink, missing_ok=True)
        widen(draft, wide)
        exact = copy.deepcopy(model).float()
        floats = [agree.cast_floats(inputs, torch.float32) for inputs in sizes]
        return "in float32", max(_gap(exact, wide, inputs, seed) for seed, inputs in enumerate(floats, 1))


def _gap(model: nn.Module, draft: Path, inputs: Inputs, seed: int) -> float:
    """The largest relative error over the outputs on fresh values."""
    args, kwargs = agree.fresh(inputs, seed)
    batch = batch_size_of(inputs)
    try:
        expected = [
            (path, tensor.detach().cpu()) for path, tensor in tensor_leaves(output_of(model, args, kwargs))
        ]
    except Exception as error:  # the model's own code: anything may come out of it, and all of it is reported
        why = f"{type(error).__name__}: {head(str(error))}"
        raise ExportError(
            f"the model itself does not run on a batch of {batch}", why=why, fix=ANY_BATCH
        ) from error
    try:
        found = agree.run_file(draft, (args, kwargs))
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        why = f"{type(error).__name__}: {head(str(error))}"
        fix = "pass dynamic_batch=False if the batch is named, another precision if a dtype is, or try another opset"
        raise ExportError(
            "ONNX Runtime cannot run the exported file", where=f"batch {batch}", why=why, fix=fix
        ) from error
    if len(found) != len(expected):
        fix = "return each output once, as a tensor or a tuple or dict of tensors"
        raise ExportError(f"the file has {len(found)} outputs and the model {len(expected)}", fix=fix)
    worst = 0.0
    for (path, tensor), array in zip(expected, found, strict=True):
        gap = agree.relative_error(array, tensor.numpy())
        limit = _TOLERANCE.get(tensor.dtype, _DEFAULT_TOLERANCE)
        if not gap <= limit:
            raise ExportError(
                f"the exported file computes something else: output differs by {gap:.1e} (at most {limit:.0e} is allowed)",
                where=f"output '{path}', batch {batch}",
                why="the exporter or ONNX Runtime changed the model's arithmetic, or forward is random or fixes the batch size",
                fix="export with dynamic_batch=False, fuse=False or another opset; compare op by op if it stays",
            )
        worst = max(worst, gap)
    return worst
