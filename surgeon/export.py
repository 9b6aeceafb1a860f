"""export(model, path) -> an ONNX file and a report; the file computes what the model computes, or there is no file.

The exporter runs with a batch of at least two, so that the batch is not taken for a constant; the file is then compared with
torch in ONNX Runtime (CPU) on the exported and on another batch size, with fresh values, before it is moved to `path`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon._quiet import quiet_run
from surgeon.errors import ExportError, InputError
from surgeon.graph import tensor_leaves
from surgeon.inputs import find_inputs, normalize

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_TOLERANCE = {torch.float16: 1e-2}  # of the largest output; all other dtypes:
_DEFAULT_TOLERANCE = 1e-4
_INLINE_LIMIT = 1 << 31  # protobuf refuses larger files
_ANY_BATCH = "pass dynamic_batch=False, or make forward independent of the batch size (-1 in views)"
_SPECIALISED = ("specializ", "specialis", "constraintviolation", "constraints violated", "static shape")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees.

    Attributes:
        path: the ONNX file; weights of more than 2 GB lie in `<path>.data` next to it.
        size_bytes: size on disk, weights included.
        params: number of elements in the file's initializers.
        error: largest over outputs and runs of max |onnx - torch| / max |torch|.
        batch_sizes: the batch sizes on which the two were compared.
        opset: version of the default ONNX operator set in the file.
    """

    path: Path
    size_bytes: int
    params: int
    error: float
    batch_sizes: tuple[int, ...]
    opset: int

    def __str__(self) -> str:
        file = f"{self.path}: {self.size_bytes:,} bytes, {self.params:,} params, opset {self.opset}"
        return f"{file}; ONNX Runtime differs from torch by {self.error:.1e} (batch {', '.join(map(str, self.batch_sizes))})"


def export(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *,
    opset: int | None = None, dynamic_batch: bool = True,
) -> ExportReport:  # fmt: skip
    """Write `model` as it is (fuse it first for speed) to an ONNX file and compare the file with the model.

    Args:
        model: any module; it runs in eval mode and keeps its training flags.
        path: the file to write; missing folders are made. It appears only if every check passes.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords). None: found from the model.
        opset: version of the default operator set. None: the exporter's default.
        dynamic_batch: let dim 0 of every input that has the batch size of the first input vary.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: the path cannot be written, the model cannot be exported, or the file computes something else.
        InputError: `example_inputs` holds no tensor, or NaN.
        CaptureError: no inputs were given and none could be found.
    """
    if not isinstance(model, nn.Module):
        raise ExportError(f"expected a torch.nn.Module, got {type(model).__name__}", fix="pass the model itself")
    target = Path(path)
    inputs = normalize(find_inputs(model)[0] if example_inputs is None else example_inputs)
    batch = batch_size_of(inputs)
    if dynamic_batch and batch == 0:
        raise ExportError("the first input has no batch dimension", fix="pass dynamic_batch=False, or inputs with a batch")
    batches: tuple[int, ...] = (batch,)
    if dynamic_batch:
        inputs = with_batch(inputs, max(batch, 2))
        batches = (max(batch, 2), 5 if batch == 3 else 3)
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            with quiet_run(model, seed=0):
                _write(model, draft, inputs, opset, batch if dynamic_batch else None)
                params, written = _check_file(draft, opset)
                error = max(_compare(model, draft, inputs, size) for size in batches)
            files = sorted(Path(folder).iterdir(), reverse=True)  # the weights before the file that names them
            size_bytes = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, target.parent / file.name)
    except OSError as problem:
        fix = "choose a path that can be written"
        raise ExportError("cannot write the file", where=str(target), why=str(problem), fix=fix) from problem
    return ExportReport(target, size_bytes, params, error, batches, written)


def batch_size_of(inputs: Inputs) -> int:
    """Dim 0 of the first tensor in (args, kwargs) that has one; 0 if all are scalars."""
    return next((int(tensor.shape[0]) for _, tensor in tensor_leaves(inputs) if tensor.ndim), 0)


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """The inputs with `size` rows, repeated or cut along dim 0 of every tensor that has the batch size of the first."""
    batch = batch_size_of(inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch or size == batch:
            return value
        return value.index_select(0, torch.arange(size, device=value.device) % max(batch, 1))

    return cast(Inputs, pytree.tree_map(resize, inputs))


def feeds(inputs: Inputs, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensor leaves of (args, kwargs) as arrays for ONNX inputs: by name where all names agree, else in order.

    Raises:
        InputError: there are more or fewer tensors than names.
    """
    leaves = [(path, tensor.detach().cpu().numpy()) for part in inputs for path, tensor in tensor_leaves(part)]
    known = dict(leaves)
    if set(names) <= set(known):
        return {name: known[name] for name in names}
    if len(names) != len(leaves):
        what = f"the file has {len(names)} inputs ({', '.join(names)}) but {len(leaves)} tensors were given"
        raise InputError(what, fix="pass example inputs with one tensor for each input of the file")
    return dict(zip(names, (array for _, array in leaves), strict=True))


def _write(model: nn.Module, draft: Path, inputs: Inputs, opset: int | None, batch: int | None) -> None:
    """Run the exporter; `batch` is the caller's batch size if dim 0 is to vary, None if every size is fixed."""
    (args, kwargs), size = inputs, batch_size_of(inputs)
    shapes: Any = None
    if batch is not None:

        def dims(value: Any) -> Any:
            return {0: "batch"} if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else None

        shapes = pytree.tree_map(dims, kwargs or args)
    large = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) > 0.9 * _INLINE_LIMIT
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    try:
        with _silence():
            torch.onnx.export(
                model, args, draft, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, optimize=True, verbose=False,
                external_data=large, **options,
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # the exporter and the model's own code: all of it is reported
        causes = [text for cause in _chain(error) if (text := str(cause).strip())]
        text = "\n".join(causes).lower()
        if batch is not None and any(word in text for word in _SPECIALISED):
            why = "its code fixes the batch size: " + _head(causes[-1])
            raise ExportError("the model cannot be exported with a dynamic batch", why=why, fix=_ANY_BATCH) from error
        raise ExportError(
            "torch.onnx.export could not export the model",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {_head(causes[-1] if causes else '')}",
            fix="change the op that is named, try dynamic_batch=False or another opset, or update torch and onnxscript",
        ) from error


def _check_file(draft: Path, opset: int | None) -> tuple[int, int]:
    """(number of initializer elements, opset) of a legal file."""
    import onnx

    try:
        onnx.checker.check_model(str(draft))
    except (onnx.checker.ValidationError, ValueError) as error:
        fix = "update torch and onnxscript, or try another opset"
        raise ExportError("the exporter wrote an illegal file", why=_head(str(error)), fix=fix) from error
    proto = onnx.load(str(draft), load_external_data=False)
    written = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise ExportError(
            f"opset {opset} was asked for but the exporter wrote {written}", fix="leave out opset, or ask for that one"
        )
    return sum(math.prod(item.dims) for item in proto.graph.initializer), written


def _compare(model: nn.Module, draft: Path, inputs: Inputs, batch: int) -> float:
    """The largest relative error over the outputs on `batch` rows of fresh values.

    Raises:
        ExportError: it is above the tolerance, or ONNX Runtime cannot run the file.
    """
    args, kwargs = _fresh(with_batch(inputs, batch), seed=batch)
    try:
        expected = [(path, tensor.detach().cpu()) for path, tensor in tensor_leaves(model(*args, **kwargs))]
    except Exception as error:  # the model's own code: anything may come out of it, and all of it is reported
        why = f"{type(error).__name__}: {_head(str(error))}"
        raise ExportError(f"the model itself does not run on a batch of {batch}", why=why, fix=_ANY_BATCH) from error
    found = _run_onnx(draft, (args, kwargs))
    if len(found) != len(expected):
        fix = "return each output once, as a tensor or a tuple or dict of tensors"
        raise ExportError(f"the file has {len(found)} outputs and the model {len(expected)}", fix=fix)
    worst = 0.0
    for (path, tensor), array in zip(expected, found, strict=True):
        gap = relative_error(array, tensor.numpy())
        limit = _TOLERANCE.get(tensor.dtype, _DEFAULT_TOLERANCE)
        if not gap <= limit:
            raise ExportError(
                f"the exported file computes something else: output differs by {gap:.1e} (at most {limit:.0e} is allowed)",
                where=f"output '{path}', batch {batch}",
                why="the exporter or ONNX Runtime changed the model's arithmetic, or forward is random or fixes the batch size",
                fix="export with dynamic_batch=False, another opset, or after surgeon.fuse(model); compare op by op if it stays",
            )
        worst = max(worst, gap)
    return worst


def _run_onnx(path: Path, inputs: Inputs) -> list[Any]:
    import onnxruntime

    try:
        with _silence():
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            return list(session.run(None, feeds(inputs, [item.name for item in session.get_inputs()])))
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        raise ExportError(
            "ONNX Runtime cannot run the exported file",
            where=f"batch {batch_size_of(inputs)}",
            why=f"{type(error).__name__}: {_head(str(error))}",
            fix="pass dynamic_batch=False if the batch is named, model.float() if a dtype is, or try another opset",
        ) from error


def relative_error(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected|; places where both are the same infinity or both NaN count as equal."""
    a, b = np.asarray(found), np.asarray(expected)
    if a.shape != b.shape:
        return math.inf
    kind = np.complex128 if np.iscomplexobj(b) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    wild = ~(np.isfinite(a) & np.isfinite(b))
    if not np.array_equal(a[wild], b[wild], equal_nan=True):
        return math.inf
    a, b = a[~wild], b[~wild]
    gap, scale = (float(np.abs(x).max(initial=0.0)) for x in (a - b, b))
    return gap / scale if scale else (math.inf if gap else 0.0)


def _fresh(inputs: Inputs, seed: int) -> Inputs:
    """Other float values in the range of the given ones: shuffled, or normal where they were constant."""
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            return value
        flat = value.detach().reshape(-1)
        if bool((flat == flat[0]).all()):
            return torch.randn(value.shape, generator=generator).to(value)
        return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)].reshape(value.shape)

    return cast(Inputs, pytree.tree_map(change, inputs))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No prints, log lines or warnings from the exporter; errors still come out as exceptions."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _head(text: str) -> str:
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][:4])[:500]
