"""torch's dynamo exporter, run on a model: what it cannot do is an `ExportError` that says why."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
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
from surgeon.onnx.interface import BATCH, OpenDim, open_dims
from surgeon.onnx.simplify import simplify as simplified
from surgeon.onnx.validate import ANY_BATCH

_DIM = re.compile(r"(?:inputs|L)((?:\[[^]]+\])+)\.(?:shape|size\(\))\[(\d+)\]")
_SAID = 3  # dims that a message names
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
    """Run the exporter; `shapes` is None if every size is fixed.

    Raises:
        ExportError: it fails, or fixes a dim that was to stay open.
    """
    for number, context in enumerate(contexts := _contexts(model), 1):
        try:
            with context:
                _write(model, draft, inputs, opset, shapes, simplify)
            return
        except ExportError:
            if number == len(contexts):
                raise


def _contexts(model: nn.Module) -> list[contextlib.AbstractContextManager[Any]]:
    """In which the exporter is tried. In inference mode torch keeps a recurrent layer in one piece, so that it becomes
    one node of the file; elsewhere it may take it apart into every step, which fixes the number of steps (seen from
    the second export of a process on).
    """
    layers = [module for module in model.modules() if isinstance(module, nn.LSTM | nn.GRU)]
    whole = layers and not any(layer.proj_size for layer in layers)  # ONNX Runtime has no projections
    return [*([torch.inference_mode()] if whole else []), contextlib.nullcontext()]


def _write(
    model: nn.Module, draft: Path, inputs: Inputs, opset: int | None, shapes: Any, simplify: bool | str
) -> None:
    args, kwargs = inputs
    large = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) > INLINE_LIMIT
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    names = _output_names(model, inputs)
    try:
        with silence():
            program = torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, optimize=False, verbose=False,
                output_names=names, **options,
            )  # fmt: skip
            assert program is not None  # without a path
            if simplify:
                simplified(program)
            program.save(draft, external_data=large)
    except OSError:
        raise
    except Exception as error:  # the exporter and the model's own code: all of it is reported
        causes = [text for cause in _chain(error) if (text := str(cause).strip())]
        text = "\n".join(causes).lower()
        if shapes is not None and any(word in text for word in _SPECIALISED):
            asked = open_dims(model, inputs, shapes)
            raise fixed(_named_in(causes[-1], asked), asked, head(causes[-1])) from error
        raise ExportError(
            "torch.onnx.export could not export the model",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {head(causes[-1] if causes else '')}",
            fix="change the op that is named, try dynamic_batch=False or another opset, or update torch and onnxscript",
        ) from error


def _named_in(text: str, asked: Sequence[Sequence[OpenDim]]) -> list[OpenDim]:
    """The open dims that the exporter's message says have one size."""
    named = {(_expression(path), int(dim)) for path, dim in _DIM.findall(text)}
    return [one for dims in asked for one in dims if (one.argument, one.dim) in named]


def _expression(path: str) -> str:
    """`['x']['mask'][0]` as `open_dims` writes it: `x['mask'][0]`."""
    first, _, rest = path.removeprefix("[").partition("]")
    return first.strip("'\"") + rest


def fixed(closed: Sequence[OpenDim], asked: Sequence[Sequence[OpenDim]], said: str = "") -> ExportError:
    """What to raise if dims that were to stay open have one size; none is known if the exporter does not say which."""
    several = [one for dims in asked for one in dims]
    if all(one.name == BATCH for one in closed or several):
        why = "its code fixes the batch size" + (f": {said}" if said else "")
        return ExportError("the model cannot be exported with a dynamic batch", why=why, fix=ANY_BATCH)
    which = ", ".join(map(str, closed[:_SAID]))
    sizes = ", ".join(f"{one.name or f'dim {one.dim}'} = {one.size}" for one in closed[:_SAID])
    left = ", ".join(map(str, (one for one in several if one not in closed)))
    return ExportError(
        f"the model cannot be exported with {which or 'these dims'} open",
        where=which or ", ".join(map(str, several[:_SAID])),
        why=(
            f"the model's code, or the exporter, gives it one size ({sizes})"
            if closed
            else "one of them has one size"
        )
        + (f": {said}" if said else ""),
        fix="leave it out of dynamic_shapes and export for the size that you will run"
        + (f" ({left} may stay)" if closed and left else "")
        + "; or make forward independent of that size: -1 in views, no Python loop or decision over it (nn.RNN loops over "
        "its steps; nn.LSTM and nn.GRU do not)",
    )


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
