"""build(name) -> (a model in eval mode with seeded random weights, example inputs); nothing is downloaded.

Names are `torchvision/NAME`, `timm/NAME` and `transformers/NAME`, and those of libraries.py; a bare name is
torchvision's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.lib.zoo import libraries, transformers, vision
from benchmarks.lib.zoo.seeded import fill_zero_weights, torchvision_models
from benchmarks.lib.zoo.vision import CLASSES, NAMES, TIMM, TORCHVISION

__all__ = ["CLASSES", "NAMES", "TIMM", "TORCHVISION", "build", "classifiers", "names"]


def names(every: bool = False) -> list[str]:
    """The sweep: one model of each family; with `every`, all of torchvision's."""
    vision = TORCHVISION
    if every:
        models = torchvision_models()
        kinds = (models, models.segmentation, models.video, models.detection, models.optical_flow)
        vision = [name for kind in kinds for name in models.list_models(module=kind)]
    found = [("torchvision", vision), ("timm", TIMM), ("transformers", transformers.NAMES)]
    return [f"{library}/{name}" for library, known in found for name in known]


def build(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """One model and inputs for it (a tensor, a tuple or a dict), both seeded; `options` go to torchvision's
    constructor.
    """
    library, _, name = name.rpartition("/")
    torch.manual_seed(0)
    if library == "transformers":
        return transformers.build(name)
    if library not in ("", "torchvision", "timm"):
        return libraries.build(f"{library}/{name}")
    model, inputs = vision.build(library, name, options)
    fill_zero_weights(model)
    return model.eval(), inputs


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that put out the classes; a pruner must keep their outputs."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
    return linear + [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == CLASSES]
