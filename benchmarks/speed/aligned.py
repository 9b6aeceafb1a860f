"""Is a model with fewer MACs faster? Aligned widths, unaligned widths and torch-pruning's, at equal MACs.

    pip install torchvision torch-pruning==1.6.1
    python -m benchmarks.speed.aligned [--models resnet50 mobilenet_v2] [--rounds 30]

Each model is cut to the same share of MACs by each tool and measured in turns with the original on one thread
by process CPU time: fused and exported in ONNX Runtime, and fused in eager torch. Efficiency is speed-up
times share of MACs: 1 means that the time went down as the MACs did.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import surgeon
from benchmarks.lib.results import first_line, markdown, write_result
from benchmarks.lib.rivals import heads_of, repair
from benchmarks.lib.zoo.models import build, classifiers

SHARES = (0.5, 0.25)
EFFICIENT = 0.88  # asked of the time for ONNX Runtime, in the rows with a latency
HEADER = [
    "model",
    "MACs",
    "widths",
    "MACs reached",
    "ONNX Runtime speed-up",
    "efficiency",
    "torch speed-up",
    "efficiency",
]


def ours(
    model: nn.Module,
    image: Tensor,
    share: float,
    round_to: int | str = "auto",
    scope: str = "uniform",
    **more: float,
) -> nn.Module:
    surgery = surgeon.inspect(model, image)
    plan = surgery.plan(macs=share, round_to=round_to, scope=scope, **more)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, graph=surgery.graph)
    return small


def theirs(model: nn.Module, image: Tensor, share: float, round_to: int | None) -> nn.Module:
    """torch-pruning with the ratio at which its MACs come closest to the share from below, by bisection."""
    import torch_pruning as tp

    def cut(ratio: float) -> tuple[float, nn.Module]:
        small = copy.deepcopy(model)
        options = {
            "importance": tp.importance.MagnitudeImportance(p=1),
            "pruning_ratio": ratio,
            "round_to": round_to,
        }
        options |= {"ignored_layers": classifiers(small), "num_heads": heads_of(small)}
        tp.pruner.MagnitudePruner(small, image, **options).step()
        repair(small)
        return macs_of(small, image), small

    whole, low, high = macs_of(model, image), 0.0, 0.95
    best = cut(high)
    for _ in range(8):
        middle = (low + high) / 2
        found = cut(middle)
        if found[0] <= share * whole:
            best, high = found, middle
        else:
            low = middle
    return best[1]


def macs_of(model: nn.Module, image: Tensor) -> float:
    return surgeon.inspect(model, image).macs


VARIANTS: dict[str, Callable[[nn.Module, Tensor, float], nn.Module]] = {
    "surgeon": lambda model, image, share: ours(model, image, share, "auto", "knapsack"),
    "surgeon, with a latency": lambda model, image, share: ours(
        model, image, share, "auto", "knapsack", latency=share / EFFICIENT
    ),
    "surgeon, uniform": lambda model, image, share: ours(model, image, share, "auto"),
    "surgeon, uniform, any width": lambda model, image, share: ours(model, image, share, 1),
    "torch-pruning": lambda model, image, share: theirs(model, image, share, None),
    "torch-pruning, round_to=16": lambda model, image, share: theirs(model, image, share, 16),
}


def rows_of(name: str, rounds: int, folder: Path) -> list[list[str]]:
    """The table's rows of one model; all its variants are measured in one run."""
    model, image = build(f"torchvision/{name}")
    image = image[:1]
    whole = macs_of(model, image)
    modules: dict[str, nn.Module] = {"original": surgeon.fuse(model)}
    shares: dict[str, float] = {"original": 1.0}
    failed: dict[str, str] = {}
    for share in SHARES:
        for variant, cut in VARIANTS.items():
            key = f"{share} {variant}"
            try:
                small = cut(copy.deepcopy(model), image, share)
                shares[key] = macs_of(small, image) / whole
                modules[key] = surgeon.fuse(small.eval())
                print(name, key, f"{shares[key]:.3f}", flush=True)
            except Exception as error:  # noqa: BLE001  # the table says how a tool fails
                failed[key] = first_line(error)
    files = {}
    for number, (key, module) in enumerate(modules.items()):
        files[key] = folder / f"{name}-{number}.onnx"
        surgeon.export(module, files[key], image, dynamic_batch=False)
    cells: dict[str, list[str]] = {key: [] for key in modules}
    for entries in (files, modules):
        table = surgeon.bench(entries, image, threads=1, repeats=rounds, clock="cpu")
        print(table)
        for row in table.rows:
            if row.ratio is not None:
                cells[row.name] += [
                    f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]",
                    f"{row.ratio * shares[row.name]:.2f}",
                ]
    rows = []
    for share in SHARES:
        for variant in VARIANTS:
            key = f"{share} {variant}"
            rest = [failed[key], *[""] * 4] if key in failed else [f"{shares[key]:.3f}", *cells[key]]
            rows.append([name, f"{share:.0%}", variant, *rest])
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=30)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in chosen.models for row in rows_of(name, chosen.rounds, Path(folder))]
    notes = [
        "Random weights, l1, image 224 x 224, batch 1; both runtimes run fused models on one thread, by CPU time.",
        (
            "surgeon: plan(macs=share), which is shared out by the knapsack; uniform: the same share of every group. With a "
            f"latency: plan(macs=share, latency=share / {EFFICIENT}): both hold, on ONNX Runtime and one thread."
        ),
        "speed-up: original time / small time, median of interleaved rounds with a 95 % bootstrap interval.",
        "efficiency: speed-up x share of MACs; 1 means that the time went down as the MACs did.",
    ]
    write_result("aligned", "Aligned widths at equal MACs", markdown(HEADER, rows), notes)


if __name__ == "__main__":
    main()
