"""build(name) -> (a torchvision model in eval mode with seeded random weights, an input of batch 1); no downloads.

torchvision binds fake kernels to its own C++ operators when it is imported; beside a build of torch that it was not made for,
those operators are missing and the import fails, so their schemas are declared here then. No model in the list calls them.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

NAMES = (
    "resnet50 mobilenet_v2 mobilenet_v3_large vgg16_bn densenet121 efficientnet_b0 inception_v3 googlenet squeezenet1_0 "
    "shufflenet_v2_x1_0 resnext50_32x4d regnet_y_400mf convnext_tiny vit_b_32 swin_t"
).split()
CLASSES = 1000
_UNINITIALISED = ("inception_v3", "googlenet")  # their own initialisation takes a minute
_library: list[torch.library.Library] = []  # the schemas live as long as this does


def build(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """One model of `NAMES` and one image for it, both seeded; `options` go to torchvision's constructor."""
    models = _torchvision_models()
    if name in _UNINITIALISED:
        options = {"init_weights": False, **options}
    torch.manual_seed(0)
    model: nn.Module = getattr(models, name)(weights=None, **options).eval()
    _fill_zero_weights(model)
    size = 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, size, size)


def _fill_zero_weights(model: nn.Module) -> None:
    """Random numbers for weights that start as zeros (the head of vit): a model that only puts out zeros hides all errors."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that put out the classes; a pruner must keep their outputs."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
    return linear + [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == CLASSES]


def _torchvision_models() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision says that its image reader is missing; nothing here reads images
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # "operator torchvision::nms does not exist"
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _library.append(library)
        return importlib.import_module("torchvision.models")
