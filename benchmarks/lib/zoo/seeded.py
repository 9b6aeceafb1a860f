"""What every model of the zoo needs: torchvision, and weights that are no zeros.

torchvision binds fake kernels to its own C++ operators when it is imported; beside a build of torch that it
was not made for, those operators are missing and the import fails. Their schemas are declared here then, and
non-maximum suppression, the only one that a model in eval mode needs and that torchvision has no Python form
of, is written out.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_libraries: list[torch.library.Library] = []  # the schemas live as long as these do


def fill_zero_weights(model: nn.Module) -> None:
    """Random numbers for weights that start as zeros (the head of vit) or as nothing: outputs of zero would
    hide all errors.
    """
    for parameter in model.parameters():
        if (parameter.dim() > 1 and not parameter.any()) or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.02)


def torchvision_models() -> Any:
    """`torchvision.models`, also beside a torch that its C++ operators were not built for."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torchvision says that its image reader is missing; nothing here reads images
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # "operator torchvision::nms does not exist"
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.impl("nms", _nms, "CPU")
            _libraries.append(library)
            boxes = importlib.import_module("torchvision.ops.boxes")
            boxes._assert_has_ops = lambda: None
        return importlib.import_module("torchvision.models")


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: of boxes that overlap by more than the threshold, the one with the best score
    stays.

    boxes [N, 4] as x1, y1, x2, y2; returns the indices that stay, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = boxes[order]
    area = (ranked[:, 2] - ranked[:, 0]) * (ranked[:, 3] - ranked[:, 1])
    gone = torch.zeros(len(order), dtype=torch.bool)
    stays = []
    for i in range(len(order)):
        if gone[i]:
            continue
        stays.append(i)
        low, high = torch.maximum(ranked[i, :2], ranked[:, :2]), torch.minimum(ranked[i, 2:], ranked[:, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        gone |= overlap > iou_threshold * (area[i] + area - overlap)
    return order[torch.tensor(stays, dtype=torch.int64)]
