"""What the step "distill" of surgeon.recover hangs on: the weight of the residual stream, the rate, and how
long it goes on.

    python -m benchmarks.studies.distilling [--data DIR] [--models resnet20 text]

A ResNet-20 on CIFAR-10 and the language model over bytes of benchmarks/accuracy/recover.py, cut by surgeon to 2.1x
fewer MACs and recovered as there, then distilled on the same unlabelled samples; one choice differs at a time
from what is built in. Measured on training data that was held out. Rows are kept in
benchmarks/.cache/distilling.json, so that a run that was stopped goes on.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import surgeon
from benchmarks.accuracy.recover import Start, by_surgeon, small_batches, task_of
from benchmarks.accuracy.recover_cells import METHODS
from benchmarks.accuracy.recover_tasks import Task
from benchmarks.lib.cifar_data import data_parser
from benchmarks.lib.results import keep, kept, markdown, write_result
from surgeon.recovery import distill
from surgeon.recovery.options import split

REDUCTION, SEED = 2.1, 0
STREAM, RATE, EPOCHS, STEPS = (
    distill._STREAM,
    distill._RATE,
    distill._EPOCHS,
    distill._STEPS,
)  # what is built in
CHOICES: dict[str, dict[str, Any]] = {
    "as built in": {},
    **{f"stream {weight:g}": {"stream": weight} for weight in (0, STREAM / 10, STREAM * 10)},
    **{f"rate {rate:.2g}": {"rate": rate} for rate in (RATE / 3, RATE * 3)},
    **{f"{factor:.2g} times the epochs": {"longer": factor} for factor in (1 / 3, 3)},
}
NOTES = [
    (
        f"Built in: the loss is the relative squared distance of the outputs plus {STREAM:g} times that of the residual stream; "
        f"the first steps change a tensor by {RATE:g} of its root mean square; {EPOCHS} epochs, or as many as make {STEPS} steps."
    ),
    (
        f"Cut to {REDUCTION}x fewer MACs and recovered as in recover.md, seed {SEED}. distance: of the outputs from the base's, "
        "relative, root mean square, on the 15 % of the samples that are held out of the step (they choose the epoch). resnet20: "
        "top-1 of 1,000 training images that are not among the samples; the base saw them in its training, so compare rows only. "
        "text: bits per byte of 512 such texts, lower is better."
    ),
]


def measured(
    task: Task, start: Start, stream: float = STREAM, rate: float = RATE, longer: float = 1
) -> dict[str, float]:
    """A row: distilled with these options."""
    assert start.plan is not None
    distill._STREAM = stream
    batches = small_batches(task, SEED)
    _, held = split([((batch,), {}) for batch in batches], 0.15)
    epochs = round(longer * max(EPOCHS, math.ceil(STEPS / held.count(False))))
    begun = time.perf_counter()
    options = {"steps": ("distill",), "epochs": epochs, "rate": rate, "seed": SEED}
    done = surgeon.recover(start.model, start.plan, task.base, batches, **options)
    seconds = time.perf_counter() - begun
    score = task.held_out(done.model, SEED)
    return {"before": done.before, "distance": done.after, "score": score, "seconds": round(seconds, 1)}


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=["resnet20", "text"], default=["resnet20", "text"])
    parser.add_argument("--table", action="store_true", help="only write the table from the cache")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = kept("distilling")
    for name in [] if asked.table else asked.models:
        todo = [choice for choice in CHOICES if f"{name}, {choice}" not in rows]
        if not todo:
            continue
        task = task_of(name, asked.data)
        start = by_surgeon(task, REDUCTION, SEED)[METHODS["surgeon"][1]]
        for choice in todo:
            rows = keep("distilling", {f"{name}, {choice}": measured(task, start, **CHOICES[choice])})
            print(name, choice, rows[f"{name}, {choice}"], flush=True)
        begin = {
            "distance": rows[f"{name}, {todo[0]}"]["before"],
            "score": task.held_out(start.model, SEED),
            "seconds": 0.0,
        }
        rows = keep("distilling", {f"{name}, {NOT}": begin})
    write_result("distilling", "What distilling hangs on", markdown(HEADER, cells(rows)), NOTES)


NOT = "not distilled"
HEADER = ["network, metric", "choice", "distance to the base", "score", "seconds"]


def cells(rows: dict[str, dict[str, float]]) -> list[list[str]]:
    """Of the table."""
    found = []
    for name, metric, scale, digits in (("resnet20", "top-1", 100, 1), ("text", "bits per byte", 1, 3)):
        for choice in (NOT, *CHOICES):
            row = rows.get(f"{name}, {choice}")
            if row is not None:
                score = f"{scale * row['score']:.{digits}f}"
                found.append(
                    [f"{name}, {metric}", choice, f"{row['distance']:.4f}", score, f"{row['seconds']:.0f}"]
                )
    return found


if __name__ == "__main__":
    main()
