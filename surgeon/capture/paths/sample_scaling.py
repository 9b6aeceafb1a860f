"""scales_samples(module, x): whether all that a module does in training mode is to scale each sample by a drawn number.

So does stochastic depth (Huang et al. 2016, "drop path"). It ties no channels, like dropout, so that no run in training
mode is needed for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.isolation.mode import Isolation
from surgeon.capture.model_state import drawn_since, python_draws
from surgeon.capture.paths.decisions import reads_a_value

_DRAWS = 3  # seeds that are tried
_PLACES = 4  # of each dim behind the first two


class _DecidesError(Exception):
    """The module's code reads a value."""


class _Undecided(Isolation):
    """A run that must not read values: what it does could hang on a draw."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if reads_a_value(func):
            raise _DecidesError
        return super().call(func, args, kwargs)


def is_bare(module: nn.Module) -> bool:
    """Whether a module holds no tensors and no other modules."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not (module._parameters or module._buffers or module._modules or hooks)


def scales_samples(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Tried on numbers that are drawn, of an input with fewer places, with several seeds.

    Args:
        module: one that `is_bare`; its mode is as before afterwards.
        shape: of an input, the samples along its first dim.
    """
    if not shape or 0 in shape or not dtype.is_floating_point:
        return False
    x = (
        torch.rand(
            (*shape[:2], *(min(n, _PLACES) for n in shape[2:])), generator=torch.Generator().manual_seed(0)
        ).to(dtype)
        + 0.5
    )
    before, draws = module.__dict__["training"], python_draws()
    module.__dict__["training"] = True
    try:
        return all(_scaled(module, x, seed) for seed in range(_DRAWS)) and not drawn_since(draws)
    finally:
        module.__dict__["training"] = before


def _scaled(module: nn.Module, x: Tensor, seed: int) -> bool:
    mode = _Undecided(seed)
    try:
        with mode:
            y = module(x.clone())
    except Exception:  # noqa: BLE001  # whatever the module's code raises: it does not only scale
        return False
    finally:
        mode.restore()
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return False
    factor = (y / x).flatten(1)[:, :1] if x.dim() > 1 else y / x
    scaled = x * factor.view(-1, *[1] * (x.dim() - 1))
    return torch.allclose(y, scaled, rtol=1e-3 if x.dtype.itemsize < 4 else 1e-5, atol=0)
