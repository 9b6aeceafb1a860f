"""What `surgeon shrink` does: model, options -> the small model's files, printed figures; all or nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from torch import nn

from surgeon import criteria
from surgeon.api.pipeline import check, inspect, prove
from surgeon.api.surgery import Surgery
from surgeon.cli.files import batches_in, in_dtype_of
from surgeon.cli.folder import ONNX, draft_in, export_any, inputs_of, writing
from surgeon.cli.reported import note
from surgeon.cli.source import Source, load, stage
from surgeon.cut.plan import Plan
from surgeon.cut.store import WEIGHTS, write
from surgeon.errors import InputError
from surgeon.files import regular_target
from surgeon.recovery.options import DEFAULT
from surgeon.recovery.recover import Recovery, recover
from surgeon.report.text import count, table
from surgeon.timing.bench import bench
from surgeon.timing.table import Table

_WIDTH = 130  # of tables that go to a file or a pipe


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be done beside the cut.

    Attributes:
        data, batch: real inputs, and how many rows of them make a batch.
        distill: also train on the data.
        out: the folder of the files.
        onnx, measure, fused: write model.onnx; measure before and after; fold batch norms in the file.
        outputs: names of the outputs that must stay.
    """

    data: Path | None
    batch: int
    distill: bool
    out: Path
    onnx: bool
    measure: bool
    fused: bool
    outputs: list[str] | None


def describe(source: Source) -> None:
    """Print what may leave a model."""
    net, inputs = load(source)
    with stage("record"):
        surgery = inspect(net, inputs)
    typer.echo(str(surgery))


def cut(source: Source, ratio: float | None, options: dict[str, Any], wanted: Wanted) -> None:
    """Cut, prove, recover, export, measure, write and print.

    Raises:
        SurgeonError: of any stage; nothing is written then.
    """
    check(ratio, **options)  # refuses bad arguments before anything runs
    shown, wanted = (
        wanted.out,
        dataclasses.replace(wanted, out=wanted.out.absolute()),
    )  # the factory may change the folder
    with writing(wanted.out):
        for name in (WEIGHTS, "plan.json", ONNX):  # before the work is done, not after it
            regular_target(wanted.out / name)
    batches = _batches(options["criterion"], wanted)
    net, inputs = load(source)
    if batches is not None:
        batches = in_dtype_of(net, batches)
        inputs = _first_row(batches[0]) if inputs is None else inputs
        options["data"] = batches if criteria.looks_at_data(options["criterion"]) else None
    with draft_in(wanted.out) as draft:
        with stage("record"):
            surgery = inspect(net, inputs, outputs=wanted.outputs)
        for remark in surgery.remarks:
            note(remark)
        with stage("choose and cut", quiet=batches is not None):
            small, plan = surgery.cut(ratio, **options)
        with stage("prove"):
            proof = prove(net, small, plan, surgery)
        found = None if batches is None else _recovered(small, plan, net, batches, wanted, source.seed)
        small = small if found is None else found.model
        timed = _written(net, small, surgery, draft, wanted)
    _print_result(net, small, plan, timed)
    typer.echo(str(proof))
    if found is not None:
        typer.echo(str(found))
    names = [WEIGHTS, "plan.json"] + [ONNX] * wanted.onnx
    typer.echo(f"written: {', '.join(names)} in {shown}")


def _batches(criterion: str, wanted: Wanted) -> list[Any] | None:
    if wanted.data is not None:
        return batches_in(wanted.data, wanted.batch)
    if wanted.distill or criteria.looks_at_data(criterion):
        what = "--distill" if wanted.distill else f"--criterion {criterion}"
        raise InputError(f"{what} needs samples", fix="pass --data FILE, some hundred inputs without labels")
    return None


def _recovered(
    small: nn.Module, plan: Plan, net: nn.Module, batches: list[Any], wanted: Wanted, seed: int
) -> Recovery:
    steps = (*DEFAULT, "distill") if wanted.distill else DEFAULT
    return recover(small, plan, net, batches, steps=steps, seed=seed)


def _written(net: nn.Module, small: nn.Module, surgery: Surgery, draft: Path, wanted: Wanted) -> Table | None:
    """Write all files into the draft folder; the latencies before and after, if they are wanted."""
    with stage("export"):
        files = _write(net, small, surgery, draft, wanted)
    timed = None
    if wanted.measure:
        with stage("measure"):
            timed = bench({"original, torch": net, "small, torch": small, **files}, inputs_of(surgery))
    for file in [*draft.glob("original.onnx*")]:  # only there to be measured
        file.unlink()
    return timed


# -- what is printed -----------------------------------------------------------------------------------------


def _print_result(model: nn.Module, small: nn.Module, plan: Plan, timed: Table | None) -> None:
    """The table before and after, and the measurements with their intervals."""
    figures: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("params", _params(model), _params(small), count),
        ("MACs", plan.macs_before, plan.macs, count),
        ("size (MB)", _megabytes(model), _megabytes(small), "{:.2f}".format),
    ]
    if timed is not None:
        time = {row.name: row.p50 for row in timed.rows}
        figures += [
            (
                f"median latency, {kind} (ms)",
                time[f"original, {kind}"],
                time[f"small, {kind}"],
                "{:.3f}".format,
            )
            for kind in ("torch", "ONNX")
            if f"small, {kind}" in time
        ]
    rows = [(what, show(a), show(b), f"{b / a:.1%}" if a else "-") for what, a, b, show in figures]
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    console.print(table(rows, type(model).__name__))
    if timed is not None:
        console.print(timed.rich())


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _megabytes(model: nn.Module) -> float:
    """Of the floating-point parameters and buffers, shared ones counted once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


# -- what is written -----------------------------------------------------------------------------------------


def _write(
    model: nn.Module, small: nn.Module, surgery: Surgery, draft: Path, wanted: Wanted
) -> dict[str, Path]:
    """All files into the draft folder; the ONNX files by the names to measure them under."""
    write(small, draft)
    files = {}
    inputs = inputs_of(surgery)
    for name, file, module in (("original, ONNX", "original.onnx", model), ("small, ONNX", ONNX, small)):
        if wanted.onnx and (wanted.measure or module is small):
            files[name] = draft / file
            export_any(module, draft / file, inputs, wanted.fused)
    return files


def _first_row(batch: Any) -> Any:
    return {name: rows[:1] for name, rows in batch.items()} if isinstance(batch, dict) else batch[:1]
