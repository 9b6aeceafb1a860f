"""The fine-tuning of benchmarks/accuracy/recover.py, the same for all tools; its choices are compared by
benchmarks/studies/recipes.py.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from benchmarks.accuracy.recover_models import Shuffled
from benchmarks.accuracy.recover_tasks import Task
from benchmarks.lib.zoo.seeded import torchvision_models
from surgeon.training import Distillation, Features

WARMUP = 20  # steps
STAGES = ["layer1", "layer2", "layer3"]  # of the ResNets


def muon(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Steps along the orthogonalised momentum of each filter bank (Jordan et al., 2024); NAdamW for
    vectors.
    """
    torchvision_models()  # timm needs it
    return importlib.import_module("timm.optim").Muon(parameters, lr=lr, momentum=0.9, nesterov=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "AdamW": partial(torch.optim.AdamW, weight_decay=1e-4),
    "Muon": muon,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What may differ between fine-tunings.

    Attributes:
        soft: weight of the teacher's outputs at temperature 4; labels have the rest.
        features: weight of the residual streams behind every "block" or every "stage", as `where` says.
        turned: share of the images that are turned, scaled and moved.
        mixed: share of the images that are mixed with others.
        frozen: batch norms keep the statistics that they start with.
    """

    optimizer: str = "SGD"
    rate: float = 0.02
    batch: int = 128
    soft: float = 0.9
    features: float = 10.0
    where: str = "block"
    turned: float = 0.0
    mixed: float = 0.0
    frozen: bool = False

    def __str__(self) -> str:
        parts = [f"{self.optimizer} {self.rate:g}", f"batch {self.batch}", f"soft {self.soft:g}"]
        parts += [f"features {self.features:g} of every {self.where}"] if self.features else []
        parts += [f"turned {self.turned:g}"] if self.turned else []
        parts += [f"mixed {self.mixed:g}"] if self.mixed else []
        return ", ".join([*parts, "frozen statistics"] if self.frozen else parts)


def turned(images: Tensor) -> Tensor:
    """Each image turned by up to 0.3 radians, scaled by up to 15 % and moved by up to 5 % of its width."""
    angle, scale, moved = (
        0.6 * torch.rand(len(images)) - 0.3,
        0.85 + 0.3 * torch.rand(len(images)),
        torch.rand(len(images), 2),
    )
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack(
        [torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1), 0.2 * moved - 0.1], 2
    )  # [N, 2, 3]
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def mixed(images: Tensor) -> Tensor:
    """Each image with up to half of another added, to keep its label.

    Mixup (Zhang et al., 2018), for what the teacher says rather than for labels (Beyer et al., 2022).
    """
    part = torch.rand(len(images), 1, 1, 1) / 2
    return (1 - part) * images + part * images[torch.randperm(len(images))]


def altered(train: Shuffled, share: float, alter: Callable[[Tensor], Tensor]) -> Shuffled:
    """The batches, with a share of the images of each altered."""

    def make(chosen: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = train.make(chosen)
        first, rest = images.tensor_split([int(share * len(images))])
        return torch.cat([alter(first), rest]), labels

    return Shuffled(train.size, train.batch, make)


def finetuned(
    model: nn.Module,
    task: Task,
    plan: surgeon.Plan | None,
    recipe: Recipe,
    *,
    epochs: int,
    images: int,
    seed: int,
    checkpoint: Path | None = None,
) -> surgeon.training.Training:
    """A copy of the model, trained with the task's base as its teacher.

    Args:
        plan: surgeon's, that made the model; None if the streams are whole.
        checkpoint: where an unfinished run goes on.
    """
    train = task.train(images, recipe.batch)
    for share, alter in ((recipe.turned, turned), (recipe.mixed, mixed)):
        train = altered(train, share, alter) if share else train
    surgery = surgeon.inspect(task.base, task.calibration(seed)[0][0][:1])
    modules = STAGES if recipe.where == "stage" else None
    features = (
        Features(surgery, surgery.plan(0.0) if plan is None else plan, modules) if recipe.features else None
    )
    return surgeon.finetune(
        copy.deepcopy(model).to(memory_format=torch.channels_last),  # faster on CPUs
        train,
        epochs=epochs,
        loss=task.loss,
        teacher=copy.deepcopy(task.base).to(memory_format=torch.channels_last),
        distillation=Distillation(
            temperature=4, weight=recipe.soft, features=features, feature_weight=recipe.features
        ),
        optimizer=lambda parameters: OPTIMIZERS[recipe.optimizer](parameters, lr=recipe.rate),
        warmup=min(WARMUP, len(train) // 5),
        precision="bf16",
        frozen_statistics=recipe.frozen,
        checkpoint=checkpoint,
        checkpoint_steps=100 if checkpoint else None,
        seed=seed,
    )
