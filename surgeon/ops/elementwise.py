"""Elementwise ops: output entry i depends on entry i of each operand (after broadcasting). Operands are
joined.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from surgeon.ops.ids import ValueIds
from surgeon.ops.table import Family, OpContext, broadcast, rule

UNARY = """normal_functional uniform exponential abs acos acosh alias asin asinh atan atanh bernoulli bitwise_not ceil celu clamp
clamp_max clamp_min clone contiguous cos cosh detach dropout elu erf erfc erfinv exp exp2 expm1 fill floor frac gelu
hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lift_fresh lift_fresh_copy log log10 log1p
log2 log_sigmoid logical_not logit mish nan_to_num native_dropout neg new_empty_like positive pow reciprocal relu relu6
round rsqrt selu sgn sigmoid sign silu sin sinh softplus softshrink sqrt square tan tanh threshold to trunc zero
_to_copy empty_like full_like ones_like rand_like randn_like zeros_like ldexp special_erf special_expit angle _conj
_conj_physical resolve_conj resolve_neg""".split()

BINARY = """add addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copy div eq floor_divide fmax fmin fmod ge gt hypot le
lerp logaddexp logical_and logical_or logical_xor lt masked_fill maximum minimum mul ne remainder rsub sub where __and__
__or__ xlogy float_power true_divide complex polar""".split()


@rule(Family.ELEMENTWISE, *UNARY, *BINARY)
def elementwise(ctx: OpContext) -> Any:
    spec = ctx.node.meta["spec"]
    if isinstance(spec, tuple):
        axes = broadcast(ctx, _operands(ctx), spec[0].shape)
        return tuple(axes if s is not None and s.shape == spec[0].shape else {} for s in spec)
    return broadcast(ctx, _operands(ctx), spec.shape)


def _operands(ctx: OpContext) -> list[tuple[ValueIds, tuple[int, ...]]]:
    found = []
    for arg in ctx.arguments.values():
        if isinstance(arg, fx.Node):
            found.append((ctx.axes(arg), ctx.shape(arg)))
    return found


@rule(Family.ELEMENTWISE, "_prelu_kernel", "prelu")
def prelu(ctx: OpContext) -> ValueIds:
    x, weight = ctx["self"], ctx["weight"]
    shape, axes = ctx.shape(weight), ctx.axes(weight)
    if len(shape) == 1 and len(ctx.out) > 1:  # one slope per channel, dim 1
        shape, axes = per_channel(shape, axes, len(ctx.out))
    return broadcast(ctx, [(ctx.axes(x), ctx.shape(x)), (axes, shape)], ctx.out)


def per_channel(shape: tuple[int, ...], axes: ValueIds, ndim: int) -> tuple[tuple[int, ...], ValueIds]:
    """A vector as it meets dim 1 of a value with `ndim` dims: [C] -> [1, C, 1, ...]."""
    wide = (1, *shape, *(1,) * (ndim - 2))
    return wide, ({1: axes[0].reshape(wide)} if 0 in axes else {})


@rule(
    Family.ELEMENTWISE,
    "native_batch_norm",
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_no_update",
    mixes=lambda c: {"input": set(range(len(c.out))) - {1}},
)
def batch_norm(ctx: OpContext) -> Any:
    """x [N, C, ...] with vectors [C]; each channel by itself, in training mode too."""
    x = ctx["input"]
    vectors = [ctx.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    ndim = len(ctx.out)
    operands = [(ctx.axes(x), ctx.shape(x))]
    for vector in (v for v in vectors if v is not None):
        shape, axes = per_channel(ctx.shape(vector), ctx.axes(vector), ndim)
        operands.append((axes, shape))
    out = broadcast(ctx, operands, ctx.out)
    return tuple(out if i == 0 else {} for i, _ in enumerate(ctx.node.meta["spec"]))
