"""Limits on gradients, between backward and the optimizer's step: by norm, by value, or for each unit by the
size of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from surgeon.errors import InputError

Clip: TypeAlias = tuple[str, float] | Callable[[list[nn.Parameter]], object]


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale all gradients together, so that their joint L2 norm is at most `limit`."""
    nn.utils.clip_grad_norm_(parameters, limit)


def clip_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp every entry of every gradient to [-limit, limit]."""
    nn.utils.clip_grad_value_(parameters, limit)


@torch.no_grad()
def clip_adaptive(parameters: Iterable[nn.Parameter], limit: float = 0.01, least: float = 1e-3) -> None:
    """Scale the gradient g of each unit with weights w, so that |g| <= limit * max(|w|, least), in L2 norms.

    A unit is one index of dim 0 of a weight, and a whole vector (bias, scale). (Brock et al.,
    High-Performance Large-Scale Image Recognition Without Normalization, 2021, who leave the classifier's
    weights out: so pass the others.)
    """
    for parameter in parameters:
        if parameter.grad is not None:
            limits = _unit_norms(parameter).clamp_min(least) * limit
            norms = _unit_norms(parameter.grad)
            parameter.grad.mul_(
                torch.where(norms > limits, limits / norms.clamp_min(1e-30), torch.ones_like(norms))
            )


CLIPS: Mapping[str, Callable[[list[nn.Parameter], float], None]] = {
    "norm": clip_norm, "value": clip_value, "adaptive": clip_adaptive,
}  # fmt: skip


def clipper(clip: Clip | None) -> Callable[[list[nn.Parameter]], object] | None:
    """What to call with the parameters.

    Raises:
        InputError: the kind is unknown, or the limit is no positive number.
    """
    if clip is None or callable(clip):
        return clip
    if not isinstance(clip, tuple) or len(clip) != 2 or clip[0] not in CLIPS:
        known = ", ".join(f"({name!r}, limit)" for name in CLIPS)
        raise InputError(
            f"unknown clip={clip!r}", fix=f"use one of {known}, or a callable (parameters) -> None"
        )
    kind, limit = clip
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise InputError(f"the limit of clip={clip!r} is no positive number")
    return lambda parameters: CLIPS[kind](parameters, limit)


def _unit_norms(tensor: Tensor) -> Tensor:
    """Norms over all dims but the first, or of a whole vector, in a shape that broadcasts."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=dims is not None)
    return norms
