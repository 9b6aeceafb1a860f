"""How long the surgery takes: surgeon (without its proof, and the proof apart) against torch-pruning, in
turns in one process.

Both get a copy of the model and one image, and return when the model is small: they record the model, find
what belongs together, score it by l1 and cut half of the channels. Peak memory is measured apart, in a
process for each tool and model.

    pip install torch-pruning==1.6.1
    python -m benchmarks.speed.surgery_time [--models resnet50 vit_b_32]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import itertools
import logging
import math
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from benchmarks.lib.results import first_line, markdown, write_result
from benchmarks.lib.zoo.models import NAMES, build, classifiers

RATIO, ROUNDS, LIMIT = 0.5, 3, 60
CHAINS = (10, 100, 1000)
NO_AUX = ("googlenet", "inception_v3")
STATUS = Path("/proc/self/status")


class TooLong(Exception):
    """The time limit of a run is over."""


def by_surgeon(model: nn.Module, image: Tensor) -> nn.Module:
    """Half of the channels out, without the proof."""
    return surgeon.shrink(model, RATIO, example_inputs=image, verify=False, round_to=1)


def by_torch_pruning(model: nn.Module, image: Tensor) -> nn.Module:
    """The same with torch-pruning; it changes the model in place."""
    import torch_pruning as tp

    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    pruner = tp.pruner.MagnitudePruner(
        model,
        image,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=classifiers(model),
        num_heads=heads,
    )
    pruner.step()
    return model


TOOLS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "surgeon": by_surgeon,
    "torch-pruning": by_torch_pruning,
}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """TooLong after so many seconds of CPU time, if Python gets to run."""

    def stop(*_: Any) -> None:
        raise TooLong(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of the tools; they would be timed, too."""
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def sample(name: str) -> tuple[nn.Module, Tensor]:
    """A model without auxiliary classifiers, which do not run in eval mode, and its image."""
    return build(name, aux_logits=False) if name in NO_AUX else build(name)


def timed(tool: str, model: nn.Module, image: Tensor) -> tuple[float, nn.Module]:
    """CPU seconds of one run on a copy that is made before the clock starts, and the small model."""
    twin = copy.deepcopy(model)
    gc.collect()
    with quiet(), limited(LIMIT):
        start = time.process_time()
        small = TOOLS[tool](twin, image)
        return time.process_time() - start, small


def times_of(
    model: nn.Module, image: Tensor, floors: list[float]
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, float]]:
    """For each tool: seconds by round, or why it failed (it is not run again then), and the share of params
    left. The floor of each round is added to `floors`.
    """
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    failed: dict[str, str] = {}
    left: dict[str, float] = {}
    for turn in range(ROUNDS):
        for tool in list(TOOLS) if turn % 2 == 0 else list(TOOLS)[::-1]:
            if tool in failed:
                continue
            try:
                took, small = timed(tool, model, image)
                if turn == 0:
                    with torch.no_grad():
                        small(image)  # a model that does not run is no result
            except Exception as error:  # noqa: BLE001  # the row says which tool fails, and how; the others still run
                failed[tool] = f"{'hangs' if isinstance(error, TooLong) else 'fails'}: {first_line(error)}"
                continue
            seconds[tool].append(took)
            if tool == "surgeon":
                floors.append(floor(model, image, small))
            left[tool] = count(small) / count(model)
    return seconds, failed, left


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def floor(model: nn.Module, image: Tensor, small: nn.Module) -> float:
    """CPU seconds of what no surgery can do without: one forward pass, and one copy of the weights that stay."""
    start = time.process_time()
    with torch.no_grad():
        model(image)
    for parameter in small.parameters():
        parameter.detach().clone()
    return time.process_time() - start


def proof_time(model: nn.Module, image: Tensor) -> float:
    """CPU seconds of one proof."""
    surgery = surgeon.inspect(model, image)
    plan = surgery.plan(RATIO, round_to=1)
    small = plan.apply(model)
    start = time.process_time()
    surgeon.verify(model, small, plan, image, graph=surgery.graph)
    return time.process_time() - start


def peak_kib(field: str) -> int:
    """VmHWM (the peak) or VmRSS (now) of this process. Like getrusage's ru_maxrss, but that one starts at the
    parent's peak.
    """
    return int(STATUS.read_text().partition(f"{field}:")[2].split()[0])


def memory_child(tool: str, name: str) -> None:
    """Print the MiB that one run of a tool takes at its peak on top of the loaded model and libraries."""
    model, image = sample(name)
    torch.set_num_threads(1)
    with quiet():
        if tool == "torch-pruning":
            import torch_pruning  # noqa: F401  # loaded before the level is taken
        TOOLS[tool](
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval(), image[:, :, :8, :8]
        )  # lazy imports, too
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = peak_kib("VmRSS")
    with quiet():
        TOOLS[tool](model, image)
    print((peak_kib("VmHWM") - before) / 1024)


def memory(tool: str, name: str) -> float | None:
    """Peak MiB of a tool on a model, measured in a new process; None where it fails."""
    command = [sys.executable, "-m", f"{__package__}.surgery_time", "--memory-of", tool, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * LIMIT, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return float(done.stdout.split()[-1])


class Residual(nn.Module):
    """conv - BN - ReLU - conv - BN around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def chain_rows() -> list[list[str]]:
    """Seconds by number of blocks: the cost of a block must not grow with the number of blocks."""
    rows = []
    for blocks in CHAINS:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), *(Residual(8) for _ in range(blocks)), nn.Conv2d(8, 4, 1)
        ).eval()
        image = torch.randn(1, 3, 8, 8)
        times = []
        for _ in range(ROUNDS):
            gc.collect()
            marks = [time.process_time()]
            surgery = surgeon.inspect(model, image)
            marks.append(time.process_time())
            plan = surgery.plan(RATIO, round_to=1)
            marks.append(time.process_time())
            plan.apply(model)
            marks.append(time.process_time())
            times.append([b - a for a, b in itertools.pairwise(marks)])
        stages = [statistics.median(column) for column in zip(*times, strict=True)]
        row = [
            str(blocks),
            *[f"{s:.2f}" for s in stages],
            f"{sum(stages):.2f}",
            f"{sum(stages) / blocks * 1e3:.2f}",
        ]
        print("chain", *row, flush=True)
        rows.append(row)
    return rows


def row_of(name: str, ratios: list[float], above: dict[str, list[float]]) -> list[str]:
    """A row; the ratio of the times is added to `ratios` where both tools ran, surgeon's time as a multiple of the
    floor, and the proof's as one of surgeon's, to `above`.
    """
    model, image = sample(name)
    floors: list[float] = []
    seconds, failed, left = times_of(model, image, floors)
    cells = [name]
    for tool in TOOLS:
        cells.append(failed[tool] if tool in failed else f"{statistics.median(seconds[tool]):.2f}")
    if failed:
        cells.append("")
    else:
        medians = [statistics.median(seconds[tool]) for tool in TOOLS]
        ratios.append(medians[1] / medians[0])
        cells.append(f"{ratios[-1]:.2f}")
    own, lowest, proof = (
        statistics.median(seconds["surgeon"]),
        statistics.median(floors),
        proof_time(model, image),
    )
    above["floor"].append(own / lowest)
    above["proof"].append(proof / own)
    cells += [f"{lowest:.2f}", f"{own / lowest:.1f}", f"{proof:.2f}"]
    cells += [f"{left[tool]:.1%}" if tool in left else "" for tool in TOOLS]
    for tool in TOOLS:
        peak = None if tool in failed else memory(tool, name)
        cells.append("" if peak is None else f"{peak:.0f}")
    return cells


def geometric(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def main() -> None:
    """Time the models one after the other, then the chains, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("TOOL", "MODEL"), help="print the peak memory of one run and stop"
    )
    args = parser.parse_args()
    if args.memory_of:
        memory_child(*args.memory_of)
        return
    torch.set_num_threads(1)
    (
        timed("surgeon", *sample("squeezenet1_0")),
        timed("torch-pruning", *sample("squeezenet1_0")),
    )  # lazy imports
    chains = markdown(
        ["blocks", "inspect s", "plan s", "apply s", "sum s", "ms per block"], chain_rows()
    )  # on a clean heap
    ratios: list[float] = []
    above: dict[str, list[float]] = {"floor": [], "proof": []}
    rows = []
    for name in args.models:
        rows.append(row_of(name, ratios, above))
        print(*rows[-1], sep="  ", flush=True)
    header = [
        "model",
        "surgeon s",
        "torch-pruning s",
        "torch-pruning / surgeon",
        "floor s",
        "surgeon / floor",
        "proof s",
        "params: surgeon",
        "params: torch-pruning",
    ]
    header += ["surgeon MiB", "torch-pruning MiB"]
    mean, floors, proofs = (geometric(values) for values in (ratios, above["floor"], above["proof"]))
    worst = f", least {min(ratios):.2f}, most {max(ratios):.2f}" if ratios else ""
    tables = f"{markdown(header, rows)}\n\nA chain of residual blocks, surgeon alone:\n\n{chains}"
    notes = [
        (
            f"Geometric mean over the {len(ratios)} models on which both ran: torch-pruning takes {mean:.2f} times as long as "
            f"surgeon{worst}."
        ),
        (
            f"Seconds of CPU time: median of {ROUNDS} rounds in turns, one thread, batch 1, ratio {RATIO:.0%}, l1 magnitude. "
            "The proof is not in surgeon's time; "
            f"torch-pruning {version('torch-pruning')} has none. No auxiliary classifiers for either."
        ),
        f"torch-pruning's run counts if its model still runs and if it ends within {LIMIT} s of CPU time.",
        (
            f"Floor: one forward pass and one copy of the weights that stay. surgeon takes {floors:.1f} times as long, and its "
            f"proof {proofs:.1f} times as long as surgeon (geometric means)."
        ),
        "MiB: peak resident memory of a run above the loaded model and libraries, in a process of its own.",
        "Chain: width 8, input 8x8.",
    ]
    write_result("surgery_time", "Time and memory of the surgery", tables, notes)


if __name__ == "__main__":
    main()
