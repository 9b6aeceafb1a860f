"""export(model, path) -> an ONNX file and a report; the file computes what the model computes, or there is no
file.

The model is fused, exported by torch's dynamo exporter with a batch of at least two, so that the batch is not
taken for a constant, and simplified. Before it is moved to `path` the file is compared in ONNX Runtime (CPU)
with the model itself (with the fused one if that was rounded to another precision) on the exported and on
another batch size, with fresh values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.capture.capture import capture
from surgeon.capture.inputs import find_inputs, normalize
from surgeon.capture.model_state import quiet_run
from surgeon.errors import CaptureError, ExportError, FileError, FuseError, InputError, MissingExtraError
from surgeon.files import silence
from surgeon.fusion.fuse import FoldReport, folds, plans_of
from surgeon.fusion.fuse import fuse as fold
from surgeon.graph.copying.model_copy import copied
from surgeon.graph.given import MODEL, PATH, check_given
from surgeon.graph.process import plain_torch
from surgeon.onnx import compare as agree
from surgeon.onnx.compare import Inputs, batch_size_of, with_batch
from surgeon.onnx.file import (
    SCOPES,
    draft_of,
    head,
    name_by_content,
    opset_of,
    params_of,
    read,
    save,
    size_on_disk,
)
from surgeon.onnx.interface import clear_stale_shapes, closed_dims, fixed_values, open_dims, settle_inputs
from surgeon.onnx.torch_export import fixed, without_writes, write
from surgeon.onnx.validate import compare, larger
from surgeon.ops.macs import macs_of

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees.

    Attributes:
        path: the ONNX file; weights of more than 2 GB lie in `<path>.<digest>.data` next to it.
        size_bytes: size on disk, weights included.
        params: elements of the file's floating-point tensors, scalars left out; what is folded in is part of
            them.
        error: largest over outputs and runs of max |onnx - torch| / max |torch|.
        batch_sizes: the batch sizes on which the two were compared.
        opset: version of the default ONNX operator set in the file.
        macs: MACs of one run on the example inputs; None where the model cannot be recorded.
        folds: what was fused.
        compared: how the file was run: "as it is", or (bfloat16: the CPU has no kernels) "in float32" with
            the same weights.
        limit: the largest error that was allowed; above 1e-4 (float16: 1e-2) it is 16 times what moves if
            each number of the model and its inputs is moved in the last bit.
        fixed: arguments that are no tensors, as "name = value": they are constants of the file.
    """

    path: Path
    size_bytes: int
    params: int
    error: float
    batch_sizes: tuple[int, ...]
    opset: int
    macs: int | None = None
    folds: FoldReport | None = None
    compared: str = "as it is"
    limit: float = 1e-4
    fixed: tuple[str, ...] = ()

    def __str__(self) -> str:
        file = f"{self.path}: {self.size_bytes:,} bytes, {self.params:,} params, opset {self.opset}"
        batches = ", ".join(map(str, self.batch_sizes))
        fixed = f"; fixed in the file: {', '.join(self.fixed)}" if self.fixed else ""
        return (
            f"{file}; ONNX Runtime differs from torch by {self.error:.1e} "
            f"(at most {self.limit:.0e} is allowed; batch {batches}){fixed}"
        )


@plain_torch()
def export(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *,
    opset: int | None = None, dynamic_batch: bool = True, dynamic_shapes: Any = None, precision: str | None = None,
    simplify: bool | str = True, fuse: bool = True,
) -> ExportReport:  # fmt: skip
    """Write `model` to an ONNX file and compare the file with the model.

    Args:
        model: any module; it runs in eval mode and keeps its training flags. It is not touched.
        path: the file to write; missing folders are made. It appears only if every check passes.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords). None: found from the model.
        opset: version of the default operator set. None: the exporter's default.
        dynamic_batch: let dim 0 of every input that has the batch size of the first input vary.
        dynamic_shapes: instead, which dims may vary, in the form of `torch.export.export`; dims that are
            named are also compared at twice their size, if the model runs there.
        precision: "fp32", "fp16" or "bf16" of weights, inputs and outputs. None: the model's own.
        simplify: fold constants and leave out what does nothing, by onnxscript's optimizer; "onnxslim": by
            onnxslim as well.
        fuse: fold batch norms and the like into layers first (see `surgeon.fuse`).

    Returns:
        An `ExportReport`. The file's metadata say surgeon's version, params, MACs and, of a cut model, a
        digest of its plans.

    Raises:
        ExportError: the path cannot be written, the model cannot be fused or exported, or the file computes
            something else.
        InputError: `example_inputs` holds no tensor, or NaN, or an option is unknown.
        CaptureError: no inputs were given and none could be found.
        MissingExtraError: onnxslim was asked for and is not installed.
    """
    check_given("surgeon.export(model, path, example_inputs)", model=(model, MODEL), path=(path, PATH))
    _check_options(precision, simplify)
    target = Path(path)
    inputs = normalize(find_inputs(model)[0] if example_inputs is None else example_inputs)
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise InputError(
            f"opset must be a whole number, got {opset!r}", fix="pass opset=20, say, or leave it out"
        )
    dynamic_batch = dynamic_batch and dynamic_shapes is None
    batch = batch_size_of(inputs)
    if dynamic_batch and batch == 0:
        raise ExportError(
            "the first input has no batch dimension", fix="pass dynamic_batch=False, or inputs with a batch"
        )
    try:
        with draft_of(target) as draft, quiet_run(model, seed=0, isolated=False):
            ready = _fused(model, inputs) if fuse else model
            expected = model
            if precision is not None:
                ready = expected = copied(ready).to(
                    PRECISIONS[precision]
                )  # as rounded: rounding is no fault of the file
                inputs = agree.cast_floats(inputs, PRECISIONS[precision])
            macs = _macs(ready, inputs)
            batches: tuple[int, ...] = (batch,)
            if dynamic_batch:
                inputs = with_batch(inputs, max(batch, 2))
                batches = (max(batch, 2), 5 if batch == 3 else 3)
                dynamic_shapes = _any_batch(inputs)
            with without_writes(ready, inputs):
                write(ready, draft, inputs, opset, dynamic_shapes, simplify)
            if simplify == "onnxslim":
                _slim(draft)
            proto = _checked(draft, opset)
            if dynamic_shapes is not None:
                asked = open_dims(ready, inputs, dynamic_shapes)
                if closed := closed_dims(proto, asked):
                    raise fixed(closed, asked)
            settle_inputs(proto, ready, inputs, dynamic_batch)
            draft.write_bytes(proto.SerializeToString())  # weights that lie beside it stay there
            sizes = [with_batch(inputs, size) for size in batches]
            if not dynamic_batch and dynamic_shapes is not None:
                sizes += larger(ready, inputs, proto)
            agreement = compare(expected, draft, sizes)
            clear_stale_shapes(proto, agreement.shapes)
            report = ExportReport(
                target, 0, params_of(proto), agreement.error, tuple(batch_size_of(s) for s in sizes), opset_of(proto), macs,
                folds(ready), agreement.how, agreement.limit, fixed_values(model, inputs),
            )  # fmt: skip
            _describe(draft, proto, report, model)
            name_by_content(draft)
            report = dataclasses.replace(report, size_bytes=size_on_disk(draft))
    except FileError as problem:
        raise ExportError(problem.what, where=problem.where, why=problem.why, fix=problem.fix) from problem
    return report


def _check_options(precision: str | None, simplify: bool | str) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}", fix=f"use one of {', '.join(PRECISIONS)}")
    if not isinstance(simplify, bool) and simplify != "onnxslim":
        raise InputError(f"unknown way to simplify: {simplify!r}", fix='use True, False or "onnxslim"')
    if simplify == "onnxslim":
        _onnxslim()


def _onnxslim() -> Any:
    try:
        import onnxslim
    except ImportError as error:
        raise MissingExtraError(
            "onnxslim is not installed", fix='pip install "surgeon-torch[deploy]"'
        ) from error
    return onnxslim


def _fused(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model with everything folded; one that `surgeon.fuse` gave is taken as it is."""
    if folds(model) is not None:
        return model
    try:
        return fold(model, inputs[1] or inputs[0])
    except FuseError as error:
        fix = f"pass fuse=False to export it as it is, or: {error.fix}"
        raise ExportError(
            f"the model cannot be fused: {error.what}", where=error.where, why=error.why, fix=fix
        ) from error
    except CaptureError as error:
        fix = f"{error.fix}; or pass fuse=False, if it cannot be recorded but runs"
        raise ExportError(error.what, where=error.where, why=error.why, fix=fix) from error


def _macs(model: nn.Module, inputs: Inputs) -> int | None:
    try:
        return macs_of(capture(model, inputs[1] or inputs[0]))
    except CaptureError:  # it is only for the record
        return None


def _any_batch(inputs: Inputs) -> Any:
    """dynamic_shapes that let dim 0 vary wherever it is the batch size."""
    (args, kwargs), size = inputs, batch_size_of(inputs)

    def dims(value: Any) -> Any:
        return {0: "batch"} if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else None

    return pytree.tree_map(dims, kwargs or args)


def _slim(draft: Path) -> None:
    with silence():
        slimmed = _onnxslim().slim(read(draft, weights=True))
    save(slimmed, draft)


def _checked(draft: Path, opset: int | None) -> Any:
    """The ModelProto (external weights stay outside) of a legal file."""
    import onnx

    try:
        onnx.checker.check_model(str(draft))
    except (onnx.checker.ValidationError, ValueError) as error:
        fix = "update torch and onnxscript, or try another opset"
        raise ExportError("the exporter wrote an illegal file", why=head(str(error)), fix=fix) from error
    proto = read(draft)
    if opset is not None and opset_of(proto) != opset:
        raise ExportError(
            f"opset {opset} was asked for but the exporter wrote {opset_of(proto)}",
            fix="leave out opset, or ask for that one",
        )
    return proto


def _describe(draft: Path, proto: Any, report: ExportReport, model: nn.Module) -> None:
    """Write surgeon's version, params, MACs and what was cut into the file's metadata.

    Of what the exporter notes on each node, source lines and paths of this machine among it, only the
    module's path stays.
    """
    try:
        version = importlib.metadata.version("surgeon-torch")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "source"
    facts = {"surgeon.version": version, "surgeon.params": str(report.params)}
    if report.macs is not None:
        facts["surgeon.macs"] = str(report.macs)
    plans = plans_of(model)
    if plans:
        kept = json.dumps([dict(plan.kept) for plan in plans], sort_keys=True)
        facts["surgeon.plan"] = hashlib.sha256(kept.encode()).hexdigest()[:16]
        facts["surgeon.architecture"] = plans[0].hash
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=value)
    del proto.graph.metadata_props[:]
    for item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        scopes = [entry for entry in item.metadata_props if entry.key == SCOPES]
        del item.metadata_props[:]
        item.metadata_props.extend(scopes)
    draft.write_bytes(proto.SerializeToString())
