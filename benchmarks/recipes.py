"""Which fine-tuning wins most back in little time: compared on training images that were held out of it, not on test images.

    pip install accelerate
    python benchmarks/recipes.py [--data DIR] [--epochs 1]

ResNet-56 on CIFAR-10, cut by surgeon to 2.1x fewer MACs and recovered as in benchmarks/recover.py, trained on all but the last
5,000 training images. Rows are kept in benchmarks/.cache/recipes.json, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar import normalised, top1
from recover import by_surgeon, task_of
from recover_cells import METHODS
from recover_recipe import Recipe, finetuned
from recover_tasks import Task, pixels_of
from results import keep, kept, markdown, write_result
from torch import Tensor, nn

from surgeon.training import soft_targets

HELD_OUT, REDUCTION = 5_000, 2.1
PLAIN = Recipe(features=0)
RECIPES = [
    PLAIN,
    *(dataclasses.replace(PLAIN, rate=rate) for rate in (0.01, 0.005)),
    dataclasses.replace(PLAIN, batch=64),
    dataclasses.replace(PLAIN, soft=0.5),
    Recipe("AdamW", 1e-3, features=0),
    *(Recipe(features=weight, where="stage") for weight in (1.0, 10.0, 100.0)),
    *(Recipe(features=weight) for weight in (10.0, 100.0)),
    Recipe(soft=0.5),
    *(Recipe(mixed=share) for share in (0.5, 1.0)),
]
NOTES = [
    (
        f"ResNet-56 at {REDUCTION}x fewer MACs, recovered without training; fine-tuned on the first 45,000 training images, "
        "measured on the last 5,000. The base saw these and their labels in its training, so that it answers them better and "
        "more surely than test images; turned, scaled and moved at random they are as hard for it as those."
    ),
    "distance: the KL divergence of softmax outputs from the base's at temperature 4, times 16.",
    (
        "soft: weight of the base's outputs; labels have the rest. features: weight of the mean squared difference of the "
        "residual stream from the base's, on the channels that are left, over the base's mean square; a sum over stages or "
        "blocks."
    ),
    "crops and mirrored, cosine to zero, momentum 0.9 and weight decay 5e-4 (SGD), bf16 autocast, one seed.",
]


@torch.inference_mode()
def distance(model: nn.Module, base: nn.Module, images: Tensor) -> float:
    """The soft targets' loss (temperature 4): 0 if the model's outputs are the base's."""
    sums = [float(soft_targets(model(x), base(x))) * len(x) for x in images.split(250)]
    return sum(sums) / len(images)


def turned(images: Tensor) -> Tensor:
    """Each image turned by up to 0.3 radians, scaled by up to 15 % and moved by up to 5 %: none that a network was trained on."""
    generator = torch.Generator().manual_seed(9)
    angle, scale = (torch.rand(len(images), generator=generator) for _ in range(2))
    angle, scale = (angle - 0.5) * 0.6, 0.85 + 0.3 * scale
    maps = torch.zeros(len(images), 2, 3)
    maps[:, 0, 0], maps[:, 0, 1] = scale * angle.cos(), -scale * angle.sin()
    maps[:, 1, 0], maps[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    maps[:, :, 2] = (torch.rand(len(images), 2, generator=generator) - 0.5) * 0.2
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def measure(model: nn.Module, task: Task, images: Tensor, labels: Tensor) -> dict[str, float]:
    """On images as they are, and turned."""
    model.eval()
    kinds = {"": images, "turned_": turned(images)}
    return {
        f"{kind}{name}": value
        for kind, x in kinds.items()
        for name, value in (("distance", distance(model, task.base, x)), ("top1", top1(model, x, labels)))
    }


def cells_of(row: Mapping[str, float]) -> list[str]:
    found = []
    for kind in ("", "turned_"):
        known = f"{kind}top1" in row
        found += [f"{row[f'{kind}distance']:.3f}", f"{row[f'{kind}top1']:.2%}"] if known else ["-", "-"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SURGEON_DATA", here.parent / "shared" / "data")))
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--table", action="store_true", help="only write the table from the cache")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = kept("recipes")
    jobs = {f"{recipe}, epochs {epochs}": (recipe, epochs) for epochs in asked.epochs for recipe in RECIPES}
    todo = [] if asked.table else [key for key in jobs if key not in rows]
    if todo or "base" not in rows:
        task = task_of("resnet56", asked.data)
        start = by_surgeon(task, REDUCTION, 0)[METHODS["surgeon"][1]]
        pixels, labels = pixels_of(asked.data / "cifar10-train.npz")
        held_out = normalised(pixels[-HELD_OUT:]), labels[-HELD_OUT:]
        rows = keep("recipes", {"base": measure(task.base, task, *held_out), "start": measure(start.model, task, *held_out)})
        for key in todo:
            recipe, epochs = jobs[key]
            done = finetuned(start.model, task, start.plan, recipe, epochs=epochs, images=len(labels) - HELD_OUT, seed=0)
            rows = keep("recipes", {key: measure(done.model, task, *held_out)})
            print(key, rows[key], flush=True)
    shown = [("base", "", "base"), ("recovered, not trained", "", "start")]
    shown += [(str(recipe), str(epochs), key) for key, (recipe, epochs) in jobs.items()]
    cells = [[name, epochs, *cells_of(rows[key])] for name, epochs, key in shown if key in rows]
    header = ["recipe", "epochs", "distance to the base", "top-1", "distance, turned", "top-1, turned"]
    write_result("recipes", "Recipes for a short fine-tuning", markdown(header, cells), NOTES)


if __name__ == "__main__":
    main()
