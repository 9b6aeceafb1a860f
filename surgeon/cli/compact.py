"""What `surgeon compact` does: weights with zeros -> the small model's files, printed figures; all or nothing is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from surgeon.api.compact import compact
from surgeon.api.pipeline import inspect
from surgeon.cli.folder import ONNX, draft_in, export_any, inputs_of, writing
from surgeon.cli.source import Source, load, stage
from surgeon.cut.store import WEIGHTS, write
from surgeon.files import regular_target


@dataclasses.dataclass(frozen=True)
class Files:
    """What is to be written.

    Attributes:
        out: the folder. onnx, fused: write model.onnx; fold batch norms in it.
    """

    out: Path
    onnx: bool
    fused: bool


def compacted(source: Source, files: Files) -> None:
    """Remove what zeros have switched off, prove, export, write and print.

    Raises:
        SurgeonError: of any stage; nothing is written then.
    """
    shown, out = files.out, files.out.absolute()  # the factory may change the folder
    with writing(out):
        for name in (WEIGHTS, "plan.json", ONNX):  # before the work is done, not after it
            regular_target(out / name)
    net, inputs = load(source)
    with draft_in(out) as draft:
        with stage("compact and prove"):
            found = compact(net, inputs)
        write(found.model, draft)
        if files.onnx:
            with stage("export"):
                export_any(found.model, draft / ONNX, inputs_of(inspect(net, inputs)), files.fused)
    typer.echo(str(found))
    names = [WEIGHTS, "plan.json"] + [ONNX] * files.onnx
    typer.echo(f"written: {', '.join(names)} in {shown}")
