"""The command line: `surgeon shrink MODEL`, `surgeon inspect MODEL`, and the commands of `cli_files` on ONNX
files.

MODEL is `file.py:factory`, `torchvision/NAME`, `timm/NAME`, `transformers/TYPE`, or a bare name that
torchvision or timm knows. Nothing is downloaded and nothing is unpickled: weights are random, or come from a
safetensors file.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from torch import nn

from surgeon import criteria
from surgeon.api.pipeline import check, inspect, prove
from surgeon.api.surgery import Surgery
from surgeon.cli.files import batches_in, register, reported
from surgeon.cli.models import build
from surgeon.cut.plan import Plan
from surgeon.cut.store import WEIGHTS, publish, write
from surgeon.errors import ExportError, FileError, InputError
from surgeon.files import draft_folder, load_weights
from surgeon.onnx.export import export
from surgeon.onnx.file import is_weights_of
from surgeon.recovery.options import DEFAULT
from surgeon.recovery.recover import recover
from surgeon.report.text import count, table
from surgeon.selection.options import SCOPES
from surgeon.timing.bench import bench
from surgeon.timing.table import Table

app = typer.Typer(
    help="Structural pruning for PyTorch: physically smaller models, proven.", no_args_is_help=True
)
register(app)

_Dtype = Literal["float32", "int64"]
_Model = Annotated[
    str,
    typer.Argument(
        help="file.py:factory, torchvision/NAME, timm/NAME, transformers/TYPE or NAME", show_default=False
    ),
]
_Input = Annotated[
    str | None, typer.Option("--input", help="Shape of the example input, such as 1,3,224,224; else found")
]
_InputDtype = Annotated[_Dtype, typer.Option(help="Dtype of --input")]
_Weights = Annotated[
    Path | None, typer.Option(help="A safetensors file with all the weights; else they are random")
]
ONNX = "model.onnx"
_WIDTH = 130  # of tables that go to a file or a pipe
_Seed = Annotated[int, typer.Option(help="Of random weights, random inputs and criterion random")]


def main() -> None:
    """Entry point of the `surgeon` command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"surgeon {importlib.metadata.version('surgeon-torch')}")
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            typer.echo("surgeon (not installed)")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Structural pruning for PyTorch: physically smaller models, proven equal to what was cut."""


@app.command("inspect")
def inspect_command(
    model: _Model,
    input_shape: _Input = None,
    input_dtype: _InputDtype = "float32",
    weights: _Weights = None,
    seed: _Seed = 0,
) -> None:
    """Print what may leave a model, what is frozen, and why."""
    with reported():
        net, inputs = _load(model, weights, input_shape, input_dtype, seed)
        with _stage("record"):
            surgery = inspect(net, inputs)
        typer.echo(str(surgery))


@app.command()
def shrink(
    model: _Model,
    ratio: Annotated[
        float | None, typer.Option(help="Share of channels to remove [default: 0.5, without a budget]")
    ] = None,
    macs: Annotated[str | None, typer.Option(help="Instead: MACs that may stay, as 50% or 1.2G")] = None,
    params: Annotated[
        str | None, typer.Option(help="Instead: parameters that may stay, as 50% or 3M")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Instead: bytes of weights that may stay, as 50% or 3MB")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Instead: bytes of activations alive at once, as 50% or 20MB")
    ] = None,
    criterion: Annotated[str, typer.Option(help=", ".join(criteria.BUILT_IN))] = "l1",
    scope: Annotated[
        str | None,
        typer.Option(help=", ".join(SCOPES) + " [default: knapsack for budgets, uniform for a ratio]"),
    ] = None,
    round_to: Annotated[
        str, typer.Option(help="Kept widths are multiples of this: a number, auto, cpu, cuda or npu")
    ] = "auto",
    heads: Annotated[str, typer.Option(help="What attention may lose: both, whole, dims or keep")] = "both",
    max_ratio: Annotated[float, typer.Option(help="The largest share that any layer may lose")] = 1.0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A module or tensor whose outputs stay; may be repeated")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option(help="An output that must stay, all by default; may be repeated")
    ] = None,
    input_shape: _Input = None,
    input_dtype: _InputDtype = "float32",
    weights: _Weights = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Real inputs, with which accuracy is won back: a .npy array [N, ...], or a .npz with one for each input"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the data in one run")] = 32,
    distill: Annotated[
        bool, typer.Option("--distill", help="Also train on the data, towards what the model gives now")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="Folder that surgeon.load reads, with model.onnx"),
    ] = Path("surgeon-out"),
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx")] = True,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure the latency before and after")
    ] = True,
    fused: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fold batch norms in model.onnx")] = True,
    seed: _Seed = 0,
) -> None:
    """Cut a model, prove the cut, win accuracy back if there are data, and write the small one."""
    with reported():
        ratio = 0.5 if ratio is None and not any((macs, params, size, memory)) else ratio
        options: dict[str, Any] = {
            "macs": macs, "params": params, "size": size, "memory": memory, "criterion": criterion, "scope": scope,
            "round_to": int(round_to) if round_to.isdigit() else round_to, "heads": heads, "max_ratio": max_ratio,
            "ignore": ignore or (), "seed": seed,
        }  # fmt: skip
        check(ratio, **options)  # refuses bad arguments before anything runs
        looks = criteria.looks_at_data(criterion)
        if data is None and (distill or looks):
            what = "--distill" if distill else f"--criterion {criterion}"
            raise InputError(
                f"{what} needs samples", fix="pass --data FILE, some hundred inputs without labels"
            )
        batches = None if data is None else batches_in(data, batch)
        net, inputs = _load(model, weights, input_shape, input_dtype, seed)
        if batches is not None:
            inputs = _first_row(batches[0]) if inputs is None else inputs
            options["data"] = batches if looks else None
        with _draft_folder(out) as draft:
            with _stage("record"):
                surgery = inspect(net, inputs, outputs=outputs)
            for remark in surgery.remarks:
                _say(f"note: {remark}")
            with _stage("choose", quiet=batches is not None):
                plan = surgery.plan(ratio, **options)
            with _stage("cut"):
                small = plan.apply(net)
            with _stage("prove"):
                proof = prove(net, small, plan, surgery)
            found = None
            if batches is not None:
                found = recover(
                    small, plan, net, batches, steps=(*DEFAULT, "distill") if distill else DEFAULT, seed=seed
                )
                small = found.model
            with _stage("export"):
                files = _write(net, small, surgery, draft, onnx=onnx, fused=fused, original=onnx and measure)
            timed = None
            if measure:
                with _stage("measure"):
                    timed = bench(
                        {"original, torch": net, "small, torch": small, **files}, _inputs_of(surgery)
                    )
            for file in [*draft.glob("original.onnx*")]:  # only there to be measured
                file.unlink()
        _print_result(net, small, plan, timed)
        typer.echo(str(proof))
        if found is not None:
            typer.echo(str(found))
        typer.echo(f"written: {', '.join([WEIGHTS, 'plan.json'] + [ONNX] * onnx)} in {out}")


# -- what is printed -----------------------------------------------------------------------------------------


def _stage(name: str, *, quiet: bool = False) -> contextlib.AbstractContextManager[Any]:
    """A spinner, on terminals only; quiet where a bar of its own shows how it goes on."""
    return contextlib.nullcontext() if quiet else Console(stderr=True).status(name)


def _say(text: str) -> None:
    typer.echo(text, err=True)


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


@contextlib.contextmanager
def _draft_folder(out: Path) -> Iterator[Path]:
    """A hidden folder in `out` whose files take the places of those of an earlier run if all went well; else
    nothing stays behind.

    Raises:
        InputError: `out` cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _writing(out):
            draft = stack.enter_context(draft_folder(out))
        yield draft
        with _writing(out):
            publish(draft, out, stale=lambda name: name == ONNX or is_weights_of(name, ONNX))


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        fix = "choose a folder that can be written"
        why = f"{error.where}: {error.why}"
        raise InputError("cannot write to --out", where=str(out), why=why, fix=fix) from error


def _write(
    model: nn.Module,
    small: nn.Module,
    surgery: Surgery,
    draft: Path,
    *,
    onnx: bool,
    fused: bool,
    original: bool,
) -> dict[str, Path]:
    """All files into the draft folder; the ONNX files by the names to measure them under."""
    write(small, draft)
    files = {}
    inputs = _inputs_of(surgery)
    for name, file, module in (
        ("original, ONNX", "original.onnx", model),
        ("small, ONNX", ONNX, small),
    ):
        if onnx and (original or module is small):
            files[name] = draft / file
            _export(module, draft / file, inputs, fused)
    return files


def _export(model: nn.Module, path: Path, inputs: Any, fused: bool) -> None:
    """With any batch size if the model can, else with the one of the inputs."""
    try:
        export(model, path, inputs, fuse=fused)
    except ExportError as error:
        export(model, path, inputs, dynamic_batch=False, fuse=fused)
        _say(f"note: {path.name} has a fixed batch size: {error.what}")


def _inputs_of(surgery: Surgery) -> Any:
    return dict(surgery.graph.kwargs) or surgery.graph.args


# -- what is read --------------------------------------------------------------------------------------------


def _load(
    model: str, weights: Path | None, shape: str | None, dtype: _Dtype, seed: int
) -> tuple[nn.Module, Any]:
    """The model in eval mode with its weights, and example inputs (None: to be found)."""
    sizes = _sizes(shape)
    torch.manual_seed(seed)
    with _stage("load"):
        net = build(model).eval()
    if weights is None:
        _say("note: no --weights were given, so the weights are random")
    else:
        load_weights(net, weights)
    if sizes is None:
        return net, None
    if dtype == "float32":
        return net, torch.randn(sizes)
    words = next((m.num_embeddings for m in net.modules() if isinstance(m, nn.Embedding)), 2)
    return net, (torch.arange(math.prod(sizes)) % words).reshape(sizes)


def _first_row(batch: Any) -> Any:
    return {name: rows[:1] for name, rows in batch.items()} if isinstance(batch, dict) else batch[:1]


def _sizes(shape: str | None) -> list[int] | None:
    if shape is None:
        return None
    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise InputError(
            f"--input {shape!r} is not a shape",
            fix="pass positive whole numbers, such as --input 1,3,224,224",
        )
    return sizes


if __name__ == "__main__":
    main()
