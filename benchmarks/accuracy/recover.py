"""What is left after a cut, what is won back without training, and after little of it; next to torch-pruning
at the same MACs.

    pip install torch-pruning==1.6.1 accelerate timm
    python -m benchmarks.accuracy.recover [--data DIR] [--models resnet20 vit] [--reductions 2.1] [--seeds 0] [--epochs
    0 1]

ResNet-20 and ResNet-56 on CIFAR-10, and a small vision transformer and a language model over bytes that are
trained here for some minutes. Before fine-tuning, both tools see the same samples (torch-pruning also their
labels), and surgeon's targets are the base's own outputs; fine-tuning is the same for both. Test data is
looked at when a cell is done. Cells are kept in benchmarks/results/recover.json, so that a run that was
stopped goes on (in the middle of an epoch, too), and the table is written from them: "-" is a cell that was
not run. --fresh measures anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgeon
from benchmarks.accuracy.recover_cells import METHODS, REDUCTIONS, Job, keep_cells, load_cells
from benchmarks.accuracy.recover_recipe import Recipe, finetuned
from benchmarks.accuracy.recover_rival import Choice, Rival, macs_of, plan_of, reestimated
from benchmarks.accuracy.recover_table import write
from benchmarks.accuracy.recover_tasks import TASKS, Task
from benchmarks.lib.cifar_data import MODELS, data_parser, require
from benchmarks.lib.results import CACHE

RECIPES = {  # of the fine-tuning
    "outputs": Recipe(features=0),
    "blocks": Recipe("Muon", 0.002, batch=32, frozen=True),
    "blocks, mixed": Recipe("Muon", 0.002, batch=32, mixed=1.0, frozen=True),
}
STARTS = {"cut": 0, "mended": 1}  # of the fine-tuning: models as cut, or after re-estimation and recovery
FILES = ["cifar10-train.npz", "cifar10-test.npz", *(f"cifar10-{name}-adapted.safetensors" for name in MODELS)]


def jobs_of(
    models: list[str],
    reductions: list[float] | None,
    seeds: list[int],
    epochs: list[int],
    recipes: Iterable[str],
    starts: Iterable[str],
) -> list[Job]:
    """All that is asked for, the most telling first; only the ResNets are fine-tuned."""
    found = [Job(model, 1.0, 0, "base", 0) for model in models]
    for model in models:
        for count in epochs:
            if count and model not in MODELS:
                continue
            for seed, recipe in itertools.product(seeds, recipes if count else [""]):
                if count:
                    found.append(Job(model, 1.0, seed, "base", count, recipe))
                wanted = [STARTS[start] for start in starts] if count else [1]
                for reduction, start in itertools.product(reductions or REDUCTIONS[model], wanted):
                    found += [
                        Job(model, reduction, seed, tool, count, recipe, start)
                        for tool in ("torch-pruning", "surgeon")
                    ]
    return sorted(found, key=lambda job: job.urgency)


@dataclasses.dataclass
class Start:
    """A model before fine-tuning: how it was made, how to make it again, and surgeon's plan (None: the
    streams are whole).
    """

    model: nn.Module
    how: str = ""
    again: Any = None
    plan: surgeon.Plan | None = None


Made = dict[str, Start]  # by method


@functools.lru_cache(maxsize=2)
def task_of(name: str, data: Path) -> Task:
    made: Task = TASKS[name](name, data)
    return made


def by_surgeon(task: Task, reduction: float, seed: int, **options: Any) -> Made:
    """Planned with the refit in mind, cut, recovered; without labels."""
    batches = [x for x, _ in task.calibration(seed)]
    surgery = surgeon.inspect(task.base, batches[0][:1])
    plan = surgery.plan(macs=1 / reduction, criterion="kfac", data=batches, round_to=1, seed=seed, **options)
    small = plan.apply(task.base)
    done = surgeon.recover(small, plan, task.base, batches, seed=seed)
    print(done, flush=True)
    cut, recovered, _ = METHODS["surgeon"]
    return {
        cut: Start(small, plan=plan),
        recovered: Start(done.model, f"distance {done.before:.3f} -> {done.after:.3f}", plan=plan),
    }


def small_batches(task: Task, seed: int) -> list[Tensor]:
    """The samples, without labels, about 25 to a batch."""
    return [
        part for x, _ in task.calibration(seed) for part in x.split(math.ceil(len(x) / (len(x) // 25 or 1)))
    ]


def distilled(task: Task, start: Start, seed: int) -> Start:
    """What was recovered, or cut by the rival, distilled on the same samples; without labels."""
    plan = plan_of(task, start.model) if start.plan is None else start.plan
    done = surgeon.recover(
        start.model, plan, task.base, small_batches(task, seed), steps=("distill",), seed=seed
    )
    print(done, flush=True)
    return Start(done.model, f"distance {done.before:.3f} -> {done.after:.3f}", plan=plan)


def by_rival(task: Task, reduction: float, seed: int, known: Mapping[str, Any]) -> Made:
    """The best of what torch-pruning offers, as cut and after batch-norm re-estimation, by samples that were
    held out.

    Args:
        known: cells of this network, reduction and seed: a choice that was made is not made again.
    """
    rival = Rival(task, seed)
    cut, renewed, _ = METHODS["torch-pruning"]
    if rival.norms and cut in known and renewed in known:
        choices = {method: Choice(**known[method]["again"]) for method in (cut, renewed)}
        models = {cut: rival.cut(choices[cut]), renewed: reestimated(rival.cut(choices[renewed]), rival.data)}
        return {
            method: Start(models[method], str(choice), known[method]["again"])
            for method, choice in choices.items()
        }
    best: dict[str, tuple[float, Choice, nn.Module]] = {}
    for found in rival.candidates(1 / reduction):
        if isinstance(found, str):
            print("   ", found, flush=True)
            continue
        choice, small = found
        models = {cut: small, renewed: reestimated(small, rival.data)} if rival.norms else {cut: small}
        for method, model in models.items():
            score = task.held_out(model, seed)
            print(
                f"    {method}: {choice}, ratio {choice.ratio:.3f}: {score:.4f} on held-out samples",
                flush=True,
            )
            if not math.isnan(score) and (method not in best or (score - best[method][0]) * task.sign > 0):
                best[method] = score, choice, model
    return {
        method: Start(model, str(choice), dataclasses.asdict(choice))
        for method, (_, choice, model) in best.items()
    }


@functools.lru_cache(maxsize=2)
def _prepared(tool: str, model: str, reduction: float, seed: int, data: Path) -> Made:
    """What a tool makes of a network, before any training."""
    task = task_of(model, data)
    if tool == "base":
        return {"base": Start(task.base)}
    if tool == "surgeon":
        return by_surgeon(task, reduction, seed)
    cells, keys = load_cells(), Job(model, reduction, seed, tool, 0).keys
    return by_rival(
        task, reduction, seed, {method: cells[key] for method, key in keys.items() if key in cells}
    )


def run(job: Job, data: Path, images: int, recipe: Recipe | None) -> dict[str, dict[str, Any]]:
    """The cells of a job by key."""
    task = task_of(job.model, data)
    begun = time.perf_counter()
    made = _prepared(job.tool, job.model, job.reduction, job.seed, data)
    if job.tool != "base" and not job.epochs:
        _, mended, further = METHODS[job.tool]
        if mended in made:
            made = {**made, further: distilled(task, made[mended], job.seed)}
    example = task.calibration(job.seed)[0][0][:1]
    cells = {}
    for method, key in job.keys.items():
        if method not in made:  # nothing to re-estimate
            cells[key] = {"value": None}
            continue
        start = made[method]
        model = start.model
        if recipe is not None:
            checkpoint = checkpoint_of(key)
            done = finetuned(
                model,
                task,
                start.plan,
                recipe,
                epochs=job.epochs,
                images=images,
                seed=job.seed,
                checkpoint=checkpoint,
            )
            print(
                "   ", *(f"epoch {epoch.number}: loss {epoch.loss:.3f}" for epoch in done.history), flush=True
            )
            checkpoint.unlink(missing_ok=True)
            model = done.model
        cells[key] = {
            "value": task.test(model),
            "macs": macs_of(model, example),
            "how": start.how,
            "again": start.again,
        }
    for cell in cells.values():
        cell["seconds"] = round(time.perf_counter() - begun, 1)
    return cells


def checkpoint_of(key: str) -> Path:
    """Of a fine-tuning that is not finished."""
    return CACHE / f"recover {key}.ckpt"


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--reductions",
        nargs="+",
        type=float,
        help="times fewer MACs (default: 1.5 2.1 2.6, LayerNorm 1.5 2.1)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 1, 3], help="of fine-tuning; 0 is none")
    parser.add_argument(
        "--tools", nargs="+", choices=list(METHODS), default=list(METHODS), help="run only these"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="of fine-tuning"
    )
    parser.add_argument(
        "--starts", nargs="+", choices=list(STARTS), default=list(STARTS), help="of fine-tuning"
    )
    parser.add_argument("--finetune-images", type=int, default=50_000)
    parser.add_argument("--fresh", action="store_true", help="measure again what is asked for")
    parser.add_argument("--table", action="store_true", help="only write the table from the cells")
    asked = parser.parse_args()
    require(asked.data, FILES)
    torch.set_num_threads(1)
    images = asked.finetune_images
    recipes = {f"{images}, {recipe}": recipe for recipe in RECIPES.values()}
    asked_for = [f"{images}, {RECIPES[name]}" for name in asked.recipes]
    jobs = jobs_of(asked.models, asked.reductions, asked.seeds, asked.epochs, asked_for, asked.starts)
    jobs = [job for job in jobs if job.tool in asked.tools or (job.tool, job.epochs) == ("base", 0)]
    if asked.fresh:
        keys = [key for job in jobs for key in job.keys.values()]
        keep_cells({}, without=keys)
        for key in keys:
            checkpoint_of(key).unlink(missing_ok=True)
    cells = load_cells()
    todo = [] if asked.table else [job for job in jobs if not all(key in cells for key in job.keys.values())]
    for number, job in enumerate(todo, 1):
        print(f"[{number} of {len(todo)}] {job}", flush=True)
        found = run(job, asked.data, images, recipes.get(job.recipe))
        for key, cell in found.items():
            print(f"  {key}: {cell}", flush=True)
        cells = keep_cells(found)
    training = (
        f"fine-tuned: surgeon.finetune for all, {images:,} training images, crops and mirrored, cosine to zero, bf16 autocast; a "
        "run of its own for each number of epochs. The base is the teacher: its outputs (temperature 4; soft: their weight, "
        "labels have the rest), or these and its residual stream behind every block. "
        + "; ".join(f"{name}: {recipe}" for name, recipe in RECIPES.items())
        + ". mixed: up to half of another image is added to each. recipes.md compares more."
    )
    write(cells, {f"{images}, {recipe}": name for name, recipe in RECIPES.items()}, training)


if __name__ == "__main__":
    main()
