"""torch's dynamo exporter, run on a model: what it cannot do is an `ExportError` that says why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.capture.model_state import output_of
from surgeon.errors import ExportError
from surgeon.files import silence
from surgeon.graph.tensors import tensor_leaves
from surgeon.onnx.compare import Inputs
from surgeon.onnx.file import INLINE_LIMIT, head
from surgeon.onnx.validate import ANY_BATCH

_SPECIALISED = ("specializ", "specialis", "constraintviolation", "constraints violated", "static shape")


@contextlib.contextmanager
def without_writes(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Layers that may work in place do not, where that changes nothing: torch.export takes twice as long over
    those that do.
    """
    layers = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    before = list(_outputs(model, inputs)) if layers else []
    try:
        for layer in layers:
            layer.inplace = False  # type: ignore[assignment]  # a flag of torch's activations
        after = list(_outputs(model, inputs)) if layers else []
        if not all(
            torch.equal(a, b) for a, b in zip(before, after, strict=True)
        ):  # forward reads what a layer wrote
            for layer in layers:
                layer.inplace = True  # type: ignore[assignment]  # the same
        yield
    finally:
        for layer in layers:
            layer.inplace = True  # type: ignore[assignment]  # the same


def _outputs(model: nn.Module, inputs: Inputs) -> Iterator[Tensor]:
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    with contextlib.suppress(Exception):  # torch.onnx.export reports what the model cannot do
        for _, tensor in tensor_leaves(output_of(model, args, kwargs)):
            yield tensor.nan_to_num() if tensor.is_floating_point() else tensor


def write(
    model: nn.Module, draft: Path, inputs: Inputs, opset: int | None, shapes: Any, simplify: bool | str
) -> None:
    """Run the exporter; `shapes` is None if every size is fixed."""
    args, kwargs = inputs
    large = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) > INLINE_LIMIT
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    names = _output_names(model, inputs)
    try:
        with silence():
            torch.onnx.export(
                model, args, draft, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, optimize=bool(simplify), verbose=False,
                external_data=large, output_names=names, **options,
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # the exporter and the model's own code: all of it is reported
        causes = [text for cause in _chain(error) if (text := str(cause).strip())]
        text = "\n".join(causes).lower()
        if shapes is not None and any(word in text for word in _SPECIALISED):
            why = "its code fixes the batch size: " + head(causes[-1])
            raise ExportError(
                "the model cannot be exported with a dynamic batch", why=why, fix=ANY_BATCH
            ) from error
        raise ExportError(
            "torch.onnx.export could not export the model",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {head(causes[-1] if causes else '')}",
            fix="change the op that is named, try dynamic_batch=False or another opset, or update torch and onnxscript",
        ) from error


def _output_names(model: nn.Module, inputs: Inputs) -> list[str] | None:
    """The names that the model gives its outputs (keys of dicts, fields); None where two are alike or the
    model fails.
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
    taken = {path for part in inputs for path, _ in tensor_leaves(part)}
    with contextlib.suppress(Exception):  # torch.onnx.export reports what the model cannot do
        names = [
            path if not path[0].isdigit() else f"output.{path}"
            for path, _ in tensor_leaves(output_of(model, args, kwargs))
        ]
        if len(set(names)) == len(names) and not taken & set(names):
            return names
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
