"""The folder that a command writes: all of its files or none, in the places of those of an earlier run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.api.surgery import Surgery
from surgeon.cli.reported import note
from surgeon.cut.carried import publish
from surgeon.errors import ExportError, FileError, InputError
from surgeon.files import draft_folder
from surgeon.onnx.export import export
from surgeon.onnx.file import is_weights_of

ONNX = "model.onnx"


@contextlib.contextmanager
def draft_in(out: Path) -> Iterator[Path]:
    """A hidden folder in `out` whose files take the places of those of an earlier run if all went well; else
    nothing stays behind.

    Raises:
        InputError: `out` cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(out):
            draft = stack.enter_context(draft_folder(out))
        yield draft
        with writing(out):
            publish(draft, out, stale=lambda name: name == ONNX or is_weights_of(name, ONNX))


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        fix = "choose a folder that can be written"
        why = f"{error.where}: {error.why}"
        raise InputError("cannot write to --out", where=str(out), why=why, fix=fix) from error


def export_any(model: nn.Module, path: Path, inputs: Any, fused: bool) -> None:
    """With any batch size if the model can, else with the one of the inputs."""
    try:
        export(model, path, inputs, fuse=fused)
    except ExportError as error:
        export(model, path, inputs, dynamic_batch=False, fuse=fused)
        note(f"{path.name} has a fixed batch size: {error.what}")


def inputs_of(surgery: Surgery) -> Any:
    return dict(surgery.graph.kwargs) or surgery.graph.args
