"""recompute(module): weights that torch's forward pre-hooks make of other parameters (weight_norm, spectral_norm,
torch.nn.utils.prune), made anew of the cut parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Made = tuple[str, Tensor]

_HOOKS: tuple[tuple[type, Callable[[Any, nn.Module], Made]], ...] = (
    (WeightNorm, lambda hook, module: (hook.name, hook.compute_weight(module))),
    (SpectralNorm, lambda hook, module: (hook.name, hook.compute_weight(module, do_power_iteration=False))),
    (prune.BasePruningMethod, lambda hook, module: (hook._tensor_name, hook.apply_mask(module))),
)


@torch.no_grad()
def recompute(module: nn.Module) -> None:
    """Set the weights that the module's own hooks make, as its next forward would."""
    for hook in module._forward_pre_hooks.values():
        for kind, make in _HOOKS:
            if isinstance(hook, kind):
                name, weight = make(hook, module)
                setattr(module, name, weight)
