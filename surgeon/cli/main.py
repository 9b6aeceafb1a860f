"""The command line: `surgeon shrink MODEL`, `surgeon inspect MODEL`, and the commands of `cli/files.py` on ONNX files.

MODEL is `file.py:factory`, `torchvision/NAME`, `timm/NAME`, `transformers/TYPE`, or a bare name that
torchvision or timm knows. Nothing is downloaded and nothing is unpickled: weights are random, or come from a
safetensors file. Help is printed without importing torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgeon import __version__
from surgeon.cli.reported import reported, run
from surgeon.selection.options import BUDGETS, OPTIONS, Option

_EXAMPLES = """Examples:

\b
    surgeon shrink torchvision/resnet18 --ratio 0.5
    surgeon shrink net.py:make --input 1,3,64,64 --macs 50% --data inputs.npy
    surgeon compact net.py:make --weights masked.safetensors --input 1,3,64,64
    surgeon inspect timm/mobilenetv2_100
    surgeon quantize surgeon-out/model.onnx int8.onnx --data inputs.npy
"""
app = typer.Typer(  # plain help comes at once, and so do plain errors
    no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

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
_LARGEST_SEED = (1 << 63) - 1
_Seed = Annotated[
    int, typer.Option(min=0, max=_LARGEST_SEED, help="Of random weights, random inputs and criterion random")
]
_File = Annotated[Path, typer.Argument(help="An ONNX file, as surgeon.export writes it", show_default=False)]
_DIGITS = 10  # of a number; longer ones are none of channels
_NOT_OFFERED = ("data", "loss", "seed")  # the shell has options of its own for these, or cannot say them


def main() -> None:
    """Entry point of the `surgeon` command."""
    run(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"surgeon {__version__}")
        raise typer.Exit


@app.callback(epilog=_EXAMPLES)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Structural pruning for PyTorch: physically smaller models, proven equal to what was cut."""


def with_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**options` those of `PlanOptions` that a shell can say."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    offered = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_default(option), annotation=_shell(option)
        )
        for name, option in OPTIONS.items()
        if name not in _NOT_OFFERED
    ]
    command.__signature__ = signature.replace(parameters=[*own, *offered])  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ |= {parameter.name: parameter.annotation for parameter in (*own, *offered)}
    return command


def _default(option: Option) -> Any:
    return None if option.default == () else option.default


def _shell(option: Option) -> Any:
    """The type of an option in the shell, with the first sentence of its meaning."""
    kind: Any = {type(None): str | None, tuple: list[str] | None}.get(
        type(option.default), type(option.default)
    )
    repeated = "; may be repeated" if isinstance(option.default, tuple) else ""
    text = " ".join(option.help.split()).partition(". ")[0].removesuffix(".")
    return Annotated[kind, typer.Option(help=text + repeated)]


def _said(options: dict[str, Any]) -> dict[str, Any]:
    """The options as `Surgery.plan` takes them."""
    block = str(options["round_to"])
    return {
        **options,
        "round_to": int(block) if block.isascii() and block.isdecimal() and len(block) < _DIGITS else block,
        "ignore": options["ignore"] or (),
        "ignore_inputs": options["ignore_inputs"] or (),
    }


@app.command("shrink")
@with_plan_options
def shrink_command(
    model: _Model,
    *,
    ratio: Annotated[
        float | None, typer.Option(help="Share of channels to remove [default: 0.5, without a budget]")
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
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, plan.json and model.onnx")] = Path(
        "surgeon-out"
    ),
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx")] = True,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure the latency before and after")
    ] = True,
    fused: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fold batch norms in model.onnx")] = True,
    seed: _Seed = 0,
    **options: Any,
) -> None:
    """Cut a model, prove the cut, win accuracy back if there are data, and write the small one."""
    with reported():
        from surgeon.cli.shrink import Wanted, cut
        from surgeon.cli.source import Source

        budgets = any(options[name] is not None for name in BUDGETS)
        cut(
            Source(model, weights, input_shape, input_dtype, seed),
            0.5 if ratio is None and not budgets else ratio,
            {**_said(options), "seed": seed},
            Wanted(data, batch, distill, out, onnx, measure, fused, outputs),
        )


@app.command("compact")
def compact_command(
    model: _Model,
    weights: Annotated[
        Path,
        typer.Option(help="A safetensors file with all the weights, zeros among them", show_default=False),
    ],
    input_shape: _Input = None,
    input_dtype: _InputDtype = "float32",
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, plan.json and model.onnx")] = Path(
        "surgeon-out"
    ),
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write model.onnx")] = True,
    fused: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fold batch norms in model.onnx")] = True,
    seed: _Seed = 0,
) -> None:
    """Remove what zeros in the weights have switched off, prove that nothing changed, and write the small model."""
    with reported():
        from surgeon.cli.compact import Files, compacted
        from surgeon.cli.source import Source

        compacted(Source(model, weights, input_shape, input_dtype, seed), Files(out, onnx, fused))


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
        from surgeon.cli.shrink import describe
        from surgeon.cli.source import Source

        describe(Source(model, weights, input_shape, input_dtype, seed))


@app.command("quantize")
def quantize_command(
    file: _File,
    out: Annotated[Path, typer.Argument(help="The file to write", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(help="Real inputs: a .npy array [N, ...], or a .npz with one array for each input name"),
    ],
    method: Annotated[str, typer.Option(help="static, dynamic or fp16")] = "static",
    ranges: Annotated[str, typer.Option(help="Of static: minmax, entropy or percentile")] = "minmax",
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
        from surgeon.cli.files import batches_in
        from surgeon.onnx.quantization.quantize import quantize

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


@app.command("doctor")
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
        from surgeon.cli.files import batches_in
        from surgeon.timing.doctor import doctor

        inputs = None if data is None else batches_in(data, batch)[0]
        typer.echo(str(doctor(file, before, inputs, threads=threads, runs=runs)))


if __name__ == "__main__":
    main()
