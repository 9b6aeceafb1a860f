"""Latency before and after: shrunk, fused, int8; on ONNX Runtime and torch, next to torch-pruning at the same
MACs.

    pip install torchvision transformers torch-pruning==1.6.1
    python -m benchmarks.speed.latency [--models resnet18 resnet50] [--rounds 30] [--share 0.5] [--fresh]

All models are cut to the same share of MACs and exported in the same way (fused, simplified). Each ratio is
the original's time over the variant's, from interleaved rounds, with a 95 % interval. What torch-pruning
leaves to its users (sizes of attention that the code reads) is set by hand. Rows are kept in
benchmarks/.cache/latency.json, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import surgeon
from benchmarks.lib.results import first_line, keep, kept, markdown, write_result
from benchmarks.lib.zoo.models import build
from benchmarks.lib.zoo.seeded import torchvision_models
from benchmarks.speed.aligned import macs_of, ours, theirs

MODELS = "resnet18 resnet50 mobilenet_v2 efficientnet_b0 vit_b_32 distilbert".split()
BATCHES, THREADS = (1, 8), (1, 2)
RIVAL = "torch-pruning"
HEADER = ["model", "runtime", "variant", "batch", "threads", "p50 ms", "speed-up", "of torch-pruning"]


def built(name: str) -> tuple[nn.Module, Any]:
    """A model and inputs of batch 1; distilbert in its published size, of 128 tokens."""
    if name != "distilbert":
        return build(name)
    torchvision_models()  # transformers imports torchvision, which takes some care: see there
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    return DistilBertModel(DistilBertConfig()).eval(), {"input_ids": torch.arange(1, 129)[None]}


def variants(model: nn.Module, inputs: Any, share: float) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(variant -> module, variant -> why there is none); the original first."""
    made: dict[str, nn.Module] = {"original": model}
    failed: dict[str, str] = {}
    for name, cut in (("shrunk", ours), (RIVAL, theirs)):
        try:
            options = "auto" if cut is ours else None
            made[name] = cut(copy.deepcopy(model), inputs, share, options).eval()  # type: ignore[operator]  # two of one form
        except Exception as error:  # noqa: BLE001  # the table says how a tool fails
            failed[name] = first_line(error)
    made["shrunk + fused"] = surgeon.fuse(made["shrunk"], inputs)
    return made, failed


def macs_left(name: str, share: float) -> list[str]:
    """A row: the share of MACs that each tool leaves."""
    model, inputs = built(name)
    whole, row = macs_of(model, inputs), [name]
    for cut, widths in ((ours, "auto"), (theirs, None)):
        try:
            row.append(f"{macs_of(cut(copy.deepcopy(model), inputs, share, widths), inputs) / whole:.2%}")  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001  # the table says how a tool fails
            row.append(first_line(error))
    return row


def files_of(made: dict[str, nn.Module], inputs: Any, folder: Path) -> dict[str, Path]:
    """The same as files; "shrunk" is exported without fusing, all others with it, and there is an int8
    file.
    """
    files = {}
    for number, (name, module) in enumerate(made.items()):
        files[name] = folder / f"{number}.onnx"
        print(surgeon.export(module, files[name], inputs, fuse=name != "shrunk"), flush=True)
    method = "dynamic" if isinstance(inputs, dict) else "static"
    files["shrunk + fused + int8"] = folder / "int8.onnx"
    print(
        surgeon.quantize(
            files["shrunk + fused"], files["shrunk + fused + int8"], _batches(inputs), method=method
        ),
        flush=True,
    )
    return files


def _batches(inputs: Any) -> list[Any]:
    """A few batches of random values to calibrate with: latency does not hang on them."""
    fresh = lambda t: torch.randn_like(t) if t.is_floating_point() else t  # noqa: E731  # short
    return [pytree.tree_map_only(Tensor, fresh, inputs) for _ in range(4)]


def rows_of(name: str, share: float, rounds: int, folder: Path) -> list[list[str]]:
    """The table's rows of one model."""
    model, inputs = built(name)
    made, failed = variants(model, inputs, share)
    rows = []
    for runtime, entries in (("ONNX Runtime", files_of(made, inputs, folder)), ("torch", made)):
        options = {"batch_size": BATCHES, "threads": THREADS, "repeats": rounds, "details": False}
        table = surgeon.bench(entries, inputs, **options)
        print(table, flush=True)
        rival = {(row.batch_size, row.threads): row.ratio for row in table.rows if row.name == RIVAL}
        for row in table.rows:
            against = rival.get((row.batch_size, row.threads))
            ahead = None if against is None or row.ratio is None else row.ratio / against
            shown = "reference" if row.ratio is None else f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"
            said = "-" if ahead is None or row.name == RIVAL else f"{ahead:.2f}"
            rows.append(
                [
                    name,
                    runtime,
                    row.name,
                    str(row.batch_size),
                    str(row.threads),
                    f"{row.p50:.2f}",
                    shown,
                    said,
                ]
            )
    rows += [[name, "-", variant, "-", "-", "-", why, "-"] for variant, why in failed.items()]
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.5, help="of MACs that stays")
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[list[str]] = []
    left: list[list[str]] = []
    for name in chosen.models:
        key = f"{name} {chosen.share} {chosen.rounds}"
        known = {} if chosen.fresh else kept("latency")
        if key not in known:
            with tempfile.TemporaryDirectory() as folder:
                known = keep(
                    "latency", {key: {"rows": rows_of(name, chosen.share, chosen.rounds, Path(folder))}}
                )
        rows += known[key]["rows"]
        if f"{key} MACs" not in known:
            known = keep("latency", {f"{key} MACs": {"row": macs_left(name, chosen.share)}})
        left.append(known[f"{key} MACs"]["row"])
    ahead = [float(row[-1]) for row in rows if row[2] == "shrunk + fused" and row[-1] != "-"]
    mean = math.exp(sum(map(math.log, ahead)) / len(ahead)) if ahead else math.nan
    least = min(ahead, default=math.nan)
    notes = [
        f"Random weights; each tool cuts to {chosen.share:.0%} of the MACs, surgeon with round_to='auto', both uniformly.",
        f"Geometric mean of surgeon's fused model over torch-pruning's: {mean:.2f} ({len(ahead)} pairs, the least {least:.2f}).",
        "distilbert: the published size, 128 tokens; int8 is dynamic there, static elsewhere (ranges from random values).",
        "torch-pruning's model is fused and exported by surgeon, as the others are; 'shrunk' is exported without fusing.",
    ]
    tables = [markdown(HEADER, rows), markdown(["MACs left", "surgeon", RIVAL], left)]
    write_result("latency", "Latency before and after", "\n\n".join(tables), notes)


if __name__ == "__main__":
    main()
