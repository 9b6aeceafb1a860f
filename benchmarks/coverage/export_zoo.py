"""Which architectures reach ONNX: shrunk at ratio 0.5, exported, and compared with torch in ONNX Runtime at
two batch sizes.

    pip install torchvision timm transformers
    python -m benchmarks.coverage.export_zoo [--filter PATTERN] [--limit SECONDS] [--fresh]

A row works if the largest relative error is at most 1e-4 in fp32 and the parameters in the file are those of
the small model (of the fused one, which holds its batch norms in the biases of its layers). Where forward
fixes the batch size, the file is exported with that size, and the row says so. Each model runs in a process
of its own with a time limit. Rows are kept in benchmarks/.cache/export_zoo.json, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.isolated import answer, sweep
from benchmarks.lib.results import markdown, write_result
from benchmarks.lib.zoo.models import NAMES, TIMM

RATIO, GOAL = 0.5, 0.95
_LARGE = {
    "halonet_h1",
    "csatv2",
    "deepseek_vit_412m",
    "gemma4_vit_167m",
    "qwen3_vit_88m",
    "nasnetalarge",
    "pnasnet5large",
}
TRANSFORMERS = (
    "bert roberta albert electra mpnet distilbert gpt2 gpt-neox opt llama mistral qwen2 vit dinov2 segformer"
).split()
HEADER = ["model", "params left", "params in file", "folds", "relative error", "batch sizes", "exported"]


def models() -> list[str]:
    """The spine's torchvision models, 30 timm families, 15 transformers architectures."""
    families = [name for name in TIMM if name not in _LARGE][::2][:30]
    libraries = {"torchvision": NAMES, "timm": families, "transformers": TRANSFORMERS}
    return [f"{library}/{name}" for library, names in libraries.items() for name in names]


def measured(name: str) -> dict[str, Any]:
    """One row, in this process."""
    import onnx
    import torch

    import surgeon
    from benchmarks.lib.zoo.models import build
    from surgeon.capture.capture import capture
    from surgeon.errors import ExportError

    model, inputs = build(name)
    for (
        parameter
    ) in model.parameters():  # the exporter keeps one of several equal tensors, such as biases of zeros
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    before = sum(p.numel() for p in model.parameters())
    small = surgeon.shrink(model, RATIO, example_inputs=inputs, round_to=1)
    fused = surgeon.fuse(small.eval(), inputs)
    read = {str(node.target) for node in capture(fused, inputs).fx.nodes if node.op == "get_attr"}
    wanted = {name: p.numel() for name, p in fused.named_parameters() if name in read}
    with tempfile.TemporaryDirectory() as folder:
        path, fixed = Path(folder) / "model.onnx", ""
        try:
            report = surgeon.export(fused, path, inputs)
        except ExportError as error:
            report, fixed = surgeon.export(fused, path, inputs, dynamic_batch=False), error.what
        surgeon.export(fused, path, inputs, dynamic_batch=not fixed, simplify=False)
        tensors = {item.name: math.prod(item.dims) for item in onnx.load(str(path)).graph.initializer}
    spread = {name.rpartition(".")[0] for name in tensors if ".lifted_tensor" in name}
    ahead = sum(
        size for name, size in wanted.items() if name not in tensors and name.rpartition(".")[0] in spread
    )
    own = {
        name for name, _ in fused.named_parameters(remove_duplicate=False)
    }  # a tied one may go by either name
    params = sum(size for name, size in tensors.items() if name in own)
    return {
        "left": sum(p.numel() for p in small.parameters()) / before, "params": params, "wanted": sum(wanted.values()) - ahead,
        "ahead": ahead,
        "folds": str(report.folds), "error": report.error, "batches": report.batch_sizes, "fixed": fixed,
    }  # fmt: skip


def cells(name: str, found: dict[str, Any]) -> list[str]:
    """The row as text."""
    if "failed" in found:
        return [name, "", "", "", "", "", found["failed"]]
    same = "same" if found["params"] == found["wanted"] else f"{found['params'] - found['wanted']:+,}"
    shown = same + (f", {found['ahead']:,} gathered ahead" if found.get("ahead") else "")
    good = (
        "yes"
        if found["error"] <= 1e-4 and same == "same" and not found["fixed"]
        else f"one batch size: {found['fixed']}"
        if found["fixed"]
        else "no"
    )
    batches = ", ".join(map(str, found["batches"]))
    return [name, f"{found['left']:.1%}", shown, found["folds"], f"{found['error']:.1e}", batches, good]


def main() -> None:
    """Run all models and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="*")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        answer(measured, chosen.one)
        return
    wanted = {name: [name] for name in fnmatch.filter(models(), chosen.filter)}
    found = sweep(
        "export_zoo", f"{__package__}.export_zoo", wanted, limit=chosen.limit, jobs=1, again=lambda row: chosen.fresh,
        show=lambda name, row: print(" | ".join(cells(name, row)), flush=True),
    )  # fmt: skip
    rows = [cells(name, row) for name, row in found.items()]
    done = sum(row[-1] == "yes" for row in rows)
    notes = [
        f"{done} of {len(rows)} ({done / max(len(rows), 1):.0%}) agree at two batch sizes; the goal is {GOAL:.0%}.",
        (
            "params in file: the parameters that it holds by name before it is simplified (which spreads tables looked up "
            "by constants, and drops rows that are not) against those that the fused small model reads. "
            "Gathered ahead: in eval mode the model's own code keeps a table that is spread by an index (attention biases), and "
            "the file holds that."
        ),
        "relative error: max |onnx - torch| / max |torch|, over outputs and both batch sizes, against the model before fusing.",
    ]
    write_result("export_zoo", "Export: the zoo at ratio 0.5", markdown(HEADER, rows), notes)


if __name__ == "__main__":
    main()
