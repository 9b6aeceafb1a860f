"""y -> s * y + t, per channel: read from a batch norm, and put into the weights of the layer before or after
it.

With y = W x + b and s = gamma / sqrt(var + eps), t = beta - mean * s (Jacob et al. 2018, section 3.2):

    after the layer:   W' = s * W (per output channel),  b' = s * b + t
    before the layer:  W' = W * s (per input channel),   b' = b + sum over taps of W t

All of it is computed in float64 and rounded once, to the dtype of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import FuseError
from surgeon.fusion.owners import TRANSPOSED
from surgeon.mend.torch_layers import refresh


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64 on the CPU, without its gradient."""
    return tensor.detach().to("cpu", torch.float64)


def of_norm(norm: Any) -> tuple[Tensor, Tensor]:
    """(s, t) of a batch norm in eval mode."""
    mean, var = exact(norm.running_mean), exact(norm.running_var)
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if norm.weight is None else scale * exact(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else exact(norm.bias)
    return scale, beta - mean * scale


def weights_of(layer: Any) -> tuple[Tensor, Tensor]:
    """(W, b) in float64; a bias of zeros where there is none."""
    weight = exact(layer.weight)
    if layer.bias is not None:
        return weight, exact(layer.bias)
    outputs = weight.shape[1] * layer.groups if isinstance(layer, TRANSPOSED) else weight.shape[0]
    return weight, torch.zeros(outputs, dtype=torch.float64)


def after(layer: Any, scale: Tensor, shift: Tensor, where: str) -> None:
    """Let the layer compute scale * y + shift, both of shape [output channels], in place."""
    weight, bias = weights_of(layer)
    ones = [1] * (weight.ndim - 2)
    if isinstance(
        layer, TRANSPOSED
    ):  # (groups * in per group, out per group, ...), output channels ordered by group
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        new = (grouped * scale.reshape(layer.groups, 1, -1, *ones)).reshape(weight.shape)
    else:  # (out, in per group, ...)
        new = weight * scale.reshape(-1, 1, *ones)
    assign(layer, new, bias * scale + shift, where)


def before(layer: Any, scale: Tensor, shift: Tensor, where: str) -> None:
    """Let the layer read scale * x + shift, both of shape [input channels], in place; padding must not come
    between.
    """
    weight, bias = weights_of(layer)
    ones = [1] * (weight.ndim - 2)
    if isinstance(layer, TRANSPOSED):  # only reached without a shift
        assign(layer, weight * scale.reshape(-1, 1, *ones), bias, where)
        return
    groups = getattr(layer, "groups", 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    added = (grouped * shift.reshape(groups, 1, -1, *ones)).flatten(2).sum(-1).reshape(-1)
    assign(layer, (grouped * scale.reshape(groups, 1, -1, *ones)).reshape(weight.shape), bias + added, where)


def assign(layer: Any, weight: Tensor, bias: Tensor, where: str) -> None:
    """Write new weights, perhaps of another shape, into a layer; it gets a bias only where that is not zero.

    Raises:
        FuseError: a value does not fit the dtype of the layer's weight.
    """
    old = layer.weight
    layer.weight = _parameter(weight, old)
    if layer.bias is not None or bool((bias != 0).any()):
        layer.bias = _parameter(bias, old if layer.bias is None else layer.bias)
    refresh(layer)
    if not all(torch.isfinite(t).all() for t in (layer.weight, layer.bias) if t is not None):
        raise FuseError(
            f"a folded weight is not finite in {old.dtype}",
            where=where,
            why="what is folded scales by more than the dtype can hold, or a tensor was not finite before",
            fix="call model.float() first, or check the weights and running statistics for NaN and infinity",
        )


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.device, like.dtype), requires_grad=like.requires_grad)
