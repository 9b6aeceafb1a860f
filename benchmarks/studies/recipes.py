"""Which fine-tuning wins most back in little time: compared on training images that were held out of it, not
on test images.

    pip install accelerate timm
    python -m benchmarks.studies.recipes [--data DIR] [--only Muon]

ResNet-56 on CIFAR-10, cut by surgeon to 2.1x fewer MACs and recovered as in benchmarks/accuracy/recover.py, then
fine-tuned a little. Rows are kept in benchmarks/.cache/recipes.json, so that a run that was stopped goes on;
two runs with different rows can go side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import recover
from benchmarks.accuracy.recover import Start, by_surgeon, task_of
from benchmarks.accuracy.recover_cells import METHODS
from benchmarks.accuracy.recover_recipe import Recipe, finetuned
from benchmarks.accuracy.recover_tasks import Task, pixels_of
from benchmarks.lib.cifar_data import data_parser, normalised
from benchmarks.lib.results import first_line, keep, kept, markdown, write_result
from surgeon.errors import InputError
from surgeon.training import soft_targets

HELD_OUT, REDUCTION = 20_000, 2.1
PLANS: dict[str, dict[str, Any]] = {  # by how they differ from that of recover.py
    "": {},
    "scope uniform": {"scope": "uniform"},
    "scope global": {"scope": "global"},
    **{f"at most {share:.0%} of a group": {"max_ratio": share} for share in (0.55, 0.6, 0.7, 0.8)},
}
BLOCKS = Recipe()
OUTPUTS, FROZEN, MIXED = (recover.RECIPES[name] for name in ("outputs", "blocks", "blocks, mixed"))
TURNED = dataclasses.replace(FROZEN, soft=0.5, turned=0.5)
COMPARED = [
    OUTPUTS,
    *(dataclasses.replace(OUTPUTS, rate=rate) for rate in (0.01, 0.005)),
    BLOCKS,
    *(dataclasses.replace(BLOCKS, rate=rate) for rate in (0.05, 0.01)),
    *(dataclasses.replace(BLOCKS, features=weight) for weight in (1.0, 30.0)),
    dataclasses.replace(BLOCKS, where="stage"),
    dataclasses.replace(BLOCKS, frozen=True, rate=0.003),
    dataclasses.replace(BLOCKS, soft=0.5, turned=0.5),
    Recipe("AdamW", 0.001),
    *(Recipe("Muon", rate) for rate in (0.003, 0.008)),
    Recipe("AdamW", 0.001, batch=32, frozen=True),
    FROZEN,
    *(dataclasses.replace(FROZEN, rate=rate) for rate in (0.008, 0.004)),
    dataclasses.replace(FROZEN, batch=16, rate=0.001),
    *(dataclasses.replace(FROZEN, features=weight) for weight in (0.0, 30.0)),
    dataclasses.replace(FROZEN, soft=0.5),
    dataclasses.replace(FROZEN, turned=0.5),
    TURNED,
    dataclasses.replace(TURNED, soft=0.1),
    dataclasses.replace(TURNED, turned=1.0),
]
SHORT, LONG, LONGER = (15_000, 1), (25_000, 3), (25_000, 6)  # images, epochs
JOBS = {
    f"{recipe}{f', {plan}' if plan else ''}; {epochs} x {images:,}": (recipe, plan, images, epochs)
    for recipe, plan, (images, epochs) in [
        *((recipe, "", SHORT) for recipe in COMPARED),
        *((FROZEN, plan, SHORT) for plan in PLANS if plan),
        *(
            (recipe, "", LONG)
            for recipe in (BLOCKS, FROZEN, dataclasses.replace(FROZEN, rate=0.004), MIXED, TURNED)
        ),
        *((FROZEN, plan, LONG) for plan in PLANS if "most" in plan),
        (TURNED, "", LONGER),
    ]
}
NOTES = [
    (
        f"ResNet-56 at {REDUCTION}x fewer MACs by surgeon, planned as in recover.md if nothing else is said, recovered without "
        "training, then trained for some epochs (epochs x images) of the first training images; measured on the last "
        f"{HELD_OUT:,}. The base saw these and their labels in its training and answers them better and more surely than test "
        "images. So they are altered in ways that no recipe trains on: a third is blurred, a third dimmed, a third noisy."
    ),
    "distance: the KL divergence of softmax outputs from the base's at temperature 4, times 16. agreement: of the top-1 classes.",
    (
        "soft: weight of the base's outputs; labels have the rest. features: weight of the mean squared difference of the "
        "residual stream from the base's, on the channels that are left, over the base's mean square; a sum over stages or "
        "blocks. turned: share of the images that are turned by up to 0.3 radians, scaled by up to 15 % and moved by up to 5 %. "
        "mixed: share of the images to which up to half of another is added."
    ),
    (
        "crops and mirrored, cosine to zero; SGD: momentum 0.9, weight decay 5e-4; Muon: timm's, momentum 0.9, its NAdamW for "
        "vectors; bf16 autocast, one seed. frozen statistics: finetune(frozen_statistics=True)."
    ),
]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Images that no network saw like this, their labels, and what the base makes of them."""

    images: Tensor
    labels: Tensor
    base: Tensor

    def of(self, model: nn.Module) -> dict[str, float]:
        found = outputs(model, self.images)
        classes = found.argmax(1)
        return {
            "distance": float(soft_targets(found, self.base)),  # temperature 4
            "top1": float((classes == self.labels).float().mean()),
            "agreement": float((classes == self.base.argmax(1)).float().mean()),
        }


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, classes]."""
    model.eval()
    return torch.cat([model(x) for x in images.split(250)])


def spoiled(images: Tensor) -> Tensor:
    """A third of the images blurred, a third dimmed, a third noisy."""
    blurred, dimmed, noisy = images.tensor_split(3)
    around = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="reflect"), 3, 1)
    noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(9))
    return torch.cat([(blurred + around) / 2, 0.45 * dimmed, noisy + noise / 4])


@functools.cache
def start(data: Path, plan: str) -> Start:
    """What is trained."""
    return by_surgeon(task_of("resnet56", data), REDUCTION, 0, **PLANS[plan])[METHODS["surgeon"][1]]


def trained(
    task: Task, begin: Start, recipe: Recipe, images: int, epochs: int, held_out: Measured
) -> dict[str, float | str]:
    """A row, or why there is none."""
    try:
        done = finetuned(begin.model, task, begin.plan, recipe, epochs=epochs, images=images, seed=0)
    except InputError as error:
        if not error.what.startswith("the loss is"):
            raise
        return {"failed": first_line(error)}
    return dict(held_out.of(done.model))


def cells_of(row: Mapping[str, float | str]) -> list[str]:
    if "failed" in row:
        return [str(row["failed"]), "-", "-"]
    return [f"{row['distance']:.3f}", f"{row['top1']:.2%}", f"{row['agreement']:.2%}"]


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--only", default="", help="run the rows whose name has this in it")
    parser.add_argument("--table", action="store_true", help="only write the table from the cache")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = kept("recipes")
    todo = [] if asked.table else [key for key in JOBS if asked.only in key and key not in rows]
    if todo:
        task = task_of("resnet56", asked.data)
        pixels, labels = pixels_of(asked.data / "cifar10-train.npz")
        images = spoiled(normalised(pixels[-HELD_OUT:]))
        held_out = Measured(images, labels[-HELD_OUT:], outputs(task.base, images))
        for key in ("base", "start"):
            if key not in rows:
                rows = keep(
                    "recipes", {key: held_out.of(task.base if key == "base" else start(asked.data, "").model)}
                )
        for key in todo:
            recipe, plan, count, epochs = JOBS[key]
            rows = keep(
                "recipes", {key: trained(task, start(asked.data, plan), recipe, count, epochs, held_out)}
            )
            print(key, rows[key], flush=True)
    shown = {"base": "base", "recovered, not trained": "start", **{key: key for key in JOBS}}
    cells = [[name, *cells_of(rows[key])] for name, key in shown.items() if key in rows]
    header = ["recipe", "distance to the base", "top-1", "agreement with the base"]
    write_result("recipes", "Recipes for a short fine-tuning", markdown(header, cells), NOTES)


if __name__ == "__main__":
    main()
