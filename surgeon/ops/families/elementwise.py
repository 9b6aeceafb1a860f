"""Elementwise ops: output entry i depends on entry i of each operand (after broadcasting), so operands are joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from surgeon.ops import masks
from surgeon.ops.context import OpContext, broadcast
from surgeon.ops.ids import ValueIds
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.table import Family, Trait, defaults, op


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


def affine(name: str, given: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """(scale, shift) of what an op computes of one operand; None if that is no scale and shift.

    Args:
        name: the op.
        given: its arguments by name; None for the operand in question.
    """
    first = given.get("self") is None
    other: Any = given.get("other" if first else "self")
    alpha = given.get("alpha", 1)
    if name == "mul":
        return other, 0
    if name == "div" and first and not given.get("rounding_mode"):
        return 1 / other, 0
    if name == "add":
        return (1, alpha * other) if first else (alpha, other)
    if name == "sub":
        return (1, -alpha * other) if first else (-alpha, other)
    if name == "rsub":  # other - alpha * self
        return (-alpha, other) if first else (1, -alpha * other)
    return None


# -- what is computed when entries are gone -----------------------------------------------------------------


def elementwise_absent(call: MaskedOp) -> Any:
    result = call.run(call.data)
    first = result[0] if isinstance(result, list | tuple) else result
    factors = [f for n in call.node.all_input_nodes for f in masks.aligned(call.mask(n), first.dim())]
    return call.outputs(result, masks.tidy(factors))


def prelu_absent(call: MaskedOp) -> Any:
    x, weight = call["self"], call["weight"]
    result = call.run(call.data)
    wide = [
        f if f.dim() == result.dim() else f.reshape(1, -1, *(1,) * (result.dim() - 2))
        for f in call.mask(weight)
    ]
    return result, masks.tidy([*call.mask(x), *wide])


defaults(Family.ELEMENTWISE, ids=elementwise, absent=elementwise_absent)

op(
    """
    normal_functional uniform exponential acos acosh asin asinh atan atanh bernoulli bitwise_not
    ceil celu clamp_max cos cosh dropout elu erf erfc erfinv exp exp2 expm1 fill
    floor frac gelu isfinite isinf isnan leaky_relu lift_fresh_copy log log10 log1p log2 log_sigmoid
    logical_not logit mish nan_to_num native_dropout positive relu6 round
    selu sgn sigmoid sign silu sin sinh softplus square tan tanh to trunc zero
    empty_like full_like ones_like rand_like randn_like zeros_like ldexp special_erf special_expit
    angle _conj _conj_physical resolve_conj resolve_neg
    """,
    Family.ELEMENTWISE,
)
op(
    "abs clamp clamp_min neg pow reciprocal rsqrt sqrt masked_fill where",
    Family.ELEMENTWISE,
    traits={Trait.PROPORTIONAL},
)
op("_to_copy", Family.ELEMENTWISE, traits={Trait.PROPORTIONAL, Trait.INCIDENTAL})
op("mul div", Family.ELEMENTWISE, traits={Trait.PROPORTIONAL, Trait.SCALES})
op("add sub rsub", Family.ELEMENTWISE, traits={Trait.ADDS})
op("relu", Family.ELEMENTWISE, traits={Trait.PROPORTIONAL, Trait.SATURATES})
op(
    "hardtanh hardswish hardsigmoid threshold softshrink hardshrink",
    Family.ELEMENTWISE,
    traits={Trait.SATURATES},
)
op("clone alias detach contiguous lift_fresh", Family.ELEMENTWISE, traits={Trait.COPIES})
op(
    """
    addcdiv addcmul atan2 bitwise_and bitwise_or bitwise_xor copy eq floor_divide fmax fmin
    fmod ge gt hypot le lerp logaddexp logical_and logical_or logical_xor lt maximum
    minimum ne remainder __and__ __or__ xlogy float_power true_divide complex
    polar logaddexp2
    """,
    Family.ELEMENTWISE,
)
op(  # gradients of activations: of forces and the like, which forward takes by autograd
    """
    elu_backward gelu_backward hardsigmoid_backward hardswish_backward hardtanh_backward
    leaky_relu_backward log_sigmoid_backward mish_backward sigmoid_backward silu_backward
    softplus_backward tanh_backward threshold_backward
    """,
    Family.ELEMENTWISE,
)
op("_prelu_kernel prelu", Family.ELEMENTWISE, ids=prelu, absent=prelu_absent)
