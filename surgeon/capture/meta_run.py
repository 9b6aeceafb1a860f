"""Runs without values: a model on the meta device, its attention kernels, its indices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from surgeon.capture.control_flow import ControlFlow, NotCompiled
from surgeon.graph.nests import map_tensors
from surgeon.graph.opaque_ops import HigherOrder, as_op


class PlainMode(TorchDispatchMode):
    """A dispatch mode that torch.compile never meets, so its handler is not wrapped against it (10 us an
    op).

    While one runs, functions that forward compiles on its way run as they are, and `cond` and `while_loop` are what
    Python does: the branch that is taken, a loop. Other operators that take functions come as ops (`HigherOrder`).
    """

    supports_higher_order_operators = True
    beneath: PlainMode | None = None  # takes every op from this one: one dispatch an op instead of two
    with_functions = False  # whether a function mode runs with it that knows control flow

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> PlainMode:
        self.control_flow = NotCompiled() if self.with_functions else ControlFlow()
        self.control_flow.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]  # torch does not say

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.control_flow.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(as_op(func), args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an op."""
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an op as it is, for the mode beneath if there is one."""
        if self.beneath is None:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrder):  # the ops of its functions come one by one
            with self.beneath:
                return func(*args, **kwargs)
        return self.beneath.call(func, args, kwargs)


class Meta(PlainMode):
    """Runs a model whose weights are on the meta device: shapes without values.

    Integer and boolean tensors that come from no weight keep their values (positions, masks, the control flow
    that reads them): they are computed for real, on the CPU, and only become meta where they meet a meta
    tensor.
    """

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in given):
            return func(*to_meta(args), **to_meta(kwargs))
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "meta":
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return (
            to_meta(out) if isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) else out
        )


class MetaAttention(TorchFunctionMode):
    """Lets attention on the meta device take the kernel that it would take on the CPU, so that both record
    the same ops.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not any(
            isinstance(a, Tensor) and a.is_meta for a in args[:3]
        ):
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    with _disable_current_modes():  # tensors that only serve to ask are no part of the run
        stand_ins = [torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value)]
        mask = None if attn_mask is None else torch.empty((), dtype=attn_mask.dtype).expand(attn_mask.shape)
        choose: Any = torch._fused_sdp_choice
        choice = choose(*stand_ins, mask, dropout_p, is_causal, **options)
    if choice != torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


def to_meta(tree: Any) -> Any:
    """Shapes and strides alone, of all tensors of a nest."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), tree)


def real_indices(tree: Any) -> Any:
    """Inputs of which the integer tensors on the meta device have values (twos: seldom a special token), on
    the CPU.
    """

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_meta or tensor.is_floating_point():
            return tensor
        return torch.full_like(tensor, 2 if tensor.dtype is not torch.bool else 1, device="cpu")

    return map_tensors(tree, made)
