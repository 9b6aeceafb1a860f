"""Kernels: what ops give in a hollow run, tensors of the right shape, order in memory and type without numbers.

Each takes what the op takes. None: the arguments are none that it knows, so the op runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
_TYPES = (torch.float32, torch.float64)


def _plain(*tensors: Any) -> bool:
    """Whether these are tensors on the CPU of one of the usual types, whose entries follow each other in memory."""
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.layout is torch.strided
        and t.is_contiguous()
        and t.device.type == "cpu"
        and t.dtype in _TYPES
        for t in tensors
    ) and (len({t.dtype for t in tensors}) == 1)


def _usual(*tensors: Tensor) -> bool:
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)


def _vector(tensor: Any, like: Tensor, size: int) -> bool:
    """Whether a tensor is none, or has one entry for each of so many channels."""
    return tensor is None or (tuple(tensor.shape) == (size,) and tensor.dtype == like.dtype)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    places = x.dim() - 2
    known = not transposed and places > 0 and x.dim() == weight.dim() and _plain(x, weight) and groups > 0
    if not known or {len(stride), len(padding), len(dilation)} != {places}:
        return None
    fits = x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(places)
    ]
    if not fits or min(sizes) < 1 or not _vector(bias, x, weight.shape[0]):
        return None
    return torch.empty((x.shape[0], weight.shape[0], *sizes), dtype=x.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **scales: Any) -> Any:
    fits = bias.dim() == 1 and bias.shape[0] in (1, b.shape[-1]) and bias.dtype == a.dtype
    return _mm(a, b) if fits and not scales else None


def _mm(a: Tensor, b: Tensor) -> Any:
    if not _usual(a, b) or a.dtype != b.dtype or a.dtype not in _TYPES or a.shape[1] != b.shape[0]:
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype)


def _bmm(a: Tensor, b: Tensor) -> Any:
    if (
        not _usual(a, b)
        or a.dtype != b.dtype
        or a.dtype not in _TYPES
        or a.shape[0] != b.shape[0]
        or a.shape[2] != b.shape[1]
    ):
        return None
    return torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=a.dtype)


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> Any:
    channels = x.shape[1] if x.dim() > 1 else 0
    known = (
        _plain(x)
        and channels
        and x.numel()
        and all(_vector(v, x, channels) for v in (weight, bias, mean, variance))
    )
    if not known or (mean is None and not training) or (training and x.numel() <= channels):
        return None
    saved = channels if training else 0
    return torch.empty_like(x), *(torch.empty(saved, dtype=x.dtype) for _ in range(2))


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    rows = x.shape[: x.dim() - len(shape)]
    given = [v for v in (weight, bias) if v is not None]
    if (
        not _plain(x, *given)
        or any(tuple(v.shape) != tuple(shape) for v in given)
        or x.shape[len(rows) :] != tuple(shape)
    ):
        return None
    saved = (*rows, *[1] * len(shape))
    return torch.empty_like(x), *(torch.empty(saved, dtype=x.dtype) for _ in range(2))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> Any:
    usual = _usual(q, k, v) and q.dim() == k.dim() == v.dim() == 4 and q.dtype in _TYPES
    if not usual or q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        return None
    batch, heads, length, _ = q.shape
    sums = torch.empty((batch, length, heads), dtype=q.dtype).transpose(1, 2)
    return torch.empty_like(q), sums  # in the order in which the queries lie


def _like(x: Tensor, *rest: Any, **more: Any) -> Any:
    return torch.empty_like(x) if _plain(x) else None


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return None if half_to_float else _like(x)


def _both(a: Any, b: Any, **more: Any) -> Any:
    if isinstance(b, Tensor):
        return torch.empty_like(a) if _plain(a, b) and a.shape == b.shape else None
    return _like(a) if isinstance(b, int | float) else None


def _in_place(x: Tensor, *rest: Any, **more: Any) -> Any:
    fits = all(r.shape == x.shape and r.dtype == x.dtype for r in rest if isinstance(r, Tensor))
    return x if x.dtype in _TYPES and fits else None


def _named(names: str) -> list[Any]:
    found = [getattr(aten, name.partition(".")[0]) for name in names.split()]
    return [
        getattr(op, name.partition(".")[2] or "default")
        for op, name in zip(found, names.split(), strict=True)
    ]


PRODUCTS: Mapping[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
"""They may begin what is hollow."""

OTHERS: Mapping[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten._softmax.default: _softmax,
    **dict.fromkeys(
        _named("relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu exp"), _like
    ),
    **dict.fromkeys(_named("add.Tensor mul.Tensor sub.Tensor div.Tensor"), _both),
    **dict.fromkeys(
        _named(
            "relu_ silu_ hardswish_ hardsigmoid_ hardtanh_ sigmoid_ leaky_relu_ elu_ add_.Tensor mul_.Tensor"
        ),
        _in_place,
    ),
}
"""They are hollow if what they read is."""

SHAPES_ALONE = frozenset(
    _named(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided"
    )
)
"""Ops that read no number of what they are given."""

SOUND_INDICES = frozenset(_named("max_pool2d_with_indices max_pool3d_with_indices"))
"""Ops that give indices within the range, whatever the numbers are that they read."""
