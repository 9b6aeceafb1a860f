"""One command for a machine with a GPU: shrink, fuse, and time in torch (eager, compiled, CUDA graphs) and
ONNX Runtime CUDA.

    pip install torchvision transformers onnxruntime-gpu
    python -m benchmarks.speed.gpu [--models resnet50 llama] [--precisions fp32 fp16 bf16] [--batches 1 8 64]
    [--device cuda]

Every original is timed against its shrunk and fused form on the same backend, in turns, by CUDA events;
inputs lie on the device. With --device cpu the same code runs on the CPU, without CUDA graphs: it shows that
it works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgeon
from benchmarks.lib.results import markdown, write_result
from surgeon.onnx.export import PRECISIONS

MODELS = "resnet50 mobilenet_v2 vit_b_16 convnext_tiny llama".split()
BACKENDS = {"cuda": ("torch", "compile", "cudagraph"), "cpu": ("torch",)}
BATCHES = (1, 8, 64)
HEADER = [
    "model",
    "precision",
    "batch",
    "backend",
    "before ms",
    "after ms",
    "speed-up",
    "peak MB before",
    "peak MB after",
]


def built(name: str) -> tuple[nn.Module, Any]:
    """A model on the CPU and inputs; "llama" is a stack of decoder blocks of the size of a model of one
    billion weights.
    """
    if name != "llama":
        from benchmarks.lib.zoo.models import build

        return build(name)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config = LlamaConfig(num_hidden_layers=16, vocab_size=8192, use_cache=False, **sizes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(128)[None] % 8192}


def pair(model: nn.Module, inputs: Any, ratio: float) -> tuple[nn.Module, nn.Module]:
    """(original, shrunk), both fused."""
    small = surgeon.shrink(model, ratio, example_inputs=inputs, round_to="cuda")
    return surgeon.fuse(model, inputs), surgeon.fuse(small.eval(), inputs)


def timed(
    models: tuple[nn.Module, nn.Module], inputs: Any, device: str, precision: str, batches: Any, rounds: int
) -> list[list[str]]:
    """Rows of one model in one precision: batch, backend, before, after, speed-up, peaks."""
    dtype = PRECISIONS[precision]
    before, after = (copy.deepcopy(model).to(device, dtype) for model in models)
    rows = []
    for backend in BACKENDS[torch.device(device).type]:
        for batch in batches:
            try:
                options = {"batch_size": batch, "repeats": rounds, "backends": [backend]}
                table = surgeon.bench({"before": before, "after": after}, inputs, **options)
            except surgeon.errors.SurgeonError as error:
                rows.append([str(batch), backend, refusal(error), *[""] * 4])
                continue
            rows.append([str(batch), backend, *_figures(table)])
    return rows


def exported(
    models: tuple[nn.Module, nn.Module], inputs: Any, batches: Any, rounds: int, folder: Path
) -> list[list[str]]:
    """Rows of ONNX Runtime CUDA in fp32 and fp16."""
    rows = []
    for precision in ("fp32", "fp16"):
        files = {name: folder / f"{name}-{precision}.onnx" for name in ("before", "after")}
        try:
            for model, file in zip(models, files.values(), strict=True):
                surgeon.export(model, file, inputs, precision=precision)
            for batch in batches:
                options = {"batch_size": batch, "repeats": rounds, "backends": ["onnxruntime-cuda"]}
                rows.append(
                    [
                        precision,
                        str(batch),
                        "onnxruntime-cuda",
                        *_figures(surgeon.bench(files, inputs, **options)),
                    ]
                )
        except surgeon.errors.SurgeonError as error:
            rows.append([precision, "-", "onnxruntime-cuda", refusal(error), *[""] * 4])
    return rows


def _figures(table: Any) -> list[str]:
    first, second = table.rows
    interval = "" if second.low is None else f" [{second.low:.2f}, {second.high:.2f}]"
    peaks = ["-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}" for row in table.rows]
    return [f"{first.p50:.3f}", f"{second.p50:.3f}", f"{second.ratio:.2f}{interval}", *peaks]


def refusal(error: Any) -> str:
    """Why a backend gives no figures."""
    return f"{error.what}: {error.why}"[:160]


def has_onnxruntime_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def rows_of(name: str, model: nn.Module, inputs: Any, chosen: Any) -> list[list[str]]:
    """All rows of one model."""
    models = pair(model, inputs, chosen.ratio)
    rows = []
    for precision in chosen.precisions:
        found = timed(models, inputs, chosen.device, precision, chosen.batches, chosen.rounds)
        rows += [[name, precision, *row] for row in found]
    if has_onnxruntime_cuda() and chosen.device != "cpu":
        with tempfile.TemporaryDirectory() as folder:
            found = exported(models, inputs, chosen.batches, chosen.rounds, Path(folder))
        rows += [[name, *row] for row in found]
    return rows


def main(args: list[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(args)
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu shows that the benchmark runs")
    warnings.simplefilter("ignore")
    rows = []
    for name in chosen.models:
        rows += rows_of(name, *built(name), chosen)
        print(rows[-1], flush=True)
    where = "cpu" if chosen.device == "cpu" else torch.cuda.get_device_name(torch.device(chosen.device))
    notes = [
        f"Device: {where}. Random weights, ratio {chosen.ratio}, widths for CUDA, both models fused.",
        "speed-up: original time / shrunk time on the same backend, median of interleaved rounds with a 95 % interval.",
        "CUDA times by events, inputs on the device; CUDA graphs and ONNX Runtime (IO binding) apart.",
    ]
    write_result(
        "cuda" if chosen.device != "cpu" else "cuda-on-cpu", "GPU latency", markdown(HEADER, rows), notes
    )


if __name__ == "__main__":
    main()
