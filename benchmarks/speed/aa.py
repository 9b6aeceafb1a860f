"""A/A: the same file against itself, many times. A 95 % interval that tells the truth holds 1 in about 19 of
20 runs.

pip install torchvision
python -m benchmarks.speed.aa [--model resnet18] [--runs 20] [--repeats 40] [--clock wall]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import surgeon
from benchmarks.lib.results import markdown, write_result
from benchmarks.lib.zoo.models import build

LEAST = 18  # of 20


def main() -> None:
    """Measure, write the table, and fail if the interval misses 1 too often."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, image = build(chosen.model)
    rows, held = [], 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        print(surgeon.export(model, file, image))
        for run in range(chosen.runs):
            options = {"repeats": chosen.repeats, "clock": chosen.clock, "seed": run, "details": False}
            row = surgeon.bench({"a": file, "again": file}, image, threads=1, **options).rows[1]
            assert row.ratio is not None and row.low is not None and row.high is not None
            inside = row.low <= 1 <= row.high
            held += inside
            rows.append(
                [
                    str(run),
                    f"{row.p50:.2f}",
                    f"{row.ratio:.4f}",
                    f"[{row.low:.4f}, {row.high:.4f}]",
                    "yes" if inside else "no",
                ]
            )
            print(rows[-1], flush=True)
    notes = [
        f"The interval holds 1 in {held} of {chosen.runs} runs.",
        f"{chosen.model}, ONNX Runtime, batch 1, one thread, {chosen.repeats} rounds, {chosen.clock} clock.",
    ]
    header = ["run", "p50 ms", "ratio", "95 % interval", "holds 1"]
    write_result("aa", "A/A: the same file twice", markdown(header, rows), notes)
    if held * 20 < LEAST * chosen.runs:
        raise SystemExit(f"the interval holds 1 in only {held} of {chosen.runs} runs")


if __name__ == "__main__":
    main()
