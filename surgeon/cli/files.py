"""The commands that work on ONNX files (`surgeon quantize IN OUT`, `surgeon doctor FILE`), and files of real
inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from surgeon.cli.arrays import read_arrays
from surgeon.errors import InputError, SurgeonError
from surgeon.onnx.methods import METHODS, RANGES
from surgeon.onnx.quantize import quantize
from surgeon.timing.doctor import doctor

_File = Annotated[Path, typer.Argument(help="An ONNX file, as surgeon.export writes it", show_default=False)]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Surgeon's own errors become a red message and exit code 1."""
    try:
        yield
    except SurgeonError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        raise typer.Exit(1) from error


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("quantize")(quantize_command)
    app.command("doctor")(doctor_command)


def quantize_command(
    file: _File,
    out: Annotated[Path, typer.Argument(help="The file to write", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(help="Real inputs: a .npy array [N, ...], or a .npz with one array for each input name"),
    ],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "static",
    ranges: Annotated[str, typer.Option(help=f"Of static: {', '.join(RANGES)}")] = "minmax",
    per_channel: Annotated[bool, typer.Option("--per-channel/--per-tensor", help="Scales of weights")] = True,
    reduce_range: Annotated[
        bool | None,
        typer.Option(
            "--reduce-range/--full-range",
            help="int8 weights of 7 bits, for x86 without VNNI [default: if this CPU is one]",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A node that stays as it is; may be repeated")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the data in one run")] = 32,
) -> None:
    """Write an int8 or fp16 copy of an ONNX file and print what it costs."""
    with reported():
        batches = batches_in(data, batch)
        made = quantize(
            file,
            out,
            batches,
            method=method,
            ranges=ranges,
            per_channel=per_channel,
            reduce_range=reduce_range,
            ignore=ignore or (),
        )
        typer.echo(str(made))


def doctor_command(
    file: _File,
    before: Annotated[Path | None, typer.Option(help="The file of the model before it was cut")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Inputs: .npy or .npz; else made from the file's shapes, batch 1")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the data in one run")] = 1,
    threads: Annotated[int, typer.Option(help="Intra-op threads")] = 1,
    runs: Annotated[int, typer.Option(help="Profiled runs")] = 20,
) -> None:
    """Say where the time of an ONNX file goes, why it is not faster, and what to change."""
    with reported():
        inputs = None if data is None else batches_in(data, batch)[0]
        typer.echo(str(doctor(file, before, inputs, threads=threads, runs=runs)))


def batches_in(path: Path, size: int) -> list[Any]:
    """Inputs of `size` rows each: tensors of a .npy file, dicts of a .npz file.

    Raises:
        InputError: the file cannot be read, holds something else than numbers, or its arrays differ in length.
    """
    arrays = read_arrays(path)
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or not counts.copy().pop():
        raise InputError(
            "the arrays have no or different numbers of rows",
            where=str(path),
            why=f"they have {sorted(counts)}",
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    parts = [
        {name: t[start : start + size] for name, t in tensors.items()}
        for start in range(0, counts.pop(), size)
    ]
    return [part[""] if set(part) == {""} else part for part in parts]
