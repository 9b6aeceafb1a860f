"""How surgeon runs a model: quietly, so that it comes back as it was, and on the meta device where it is too big to be real."""

from __future__ import annotations

import contextlib
import gc
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def copies(inputs: Any) -> Any:
    """Copies of a model's inputs: it may write into a list (as SlowFast) or a tensor (as RCAN). One given twice is one again."""
    known: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), tensor.clone())

    with _disable_current_modes():
        return torch.utils._pytree.tree_map_only(Tensor, copied, inputs)


def output_of(model: Any, args: Any, kwargs: Any) -> Any:
    """The model's output for copies of these inputs."""
    args, kwargs = copies((args, kwargs))
    return model(*args, **kwargs)


class PlainMode(TorchDispatchMode):
    """A dispatch mode that torch.compile never meets, so its handler is not wrapped against it (10 us an op)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Meta(PlainMode):
    """Runs a model whose weights are on the meta device: shapes without values.

    Integer and boolean tensors that come from no weight keep their values (positions, masks, the control flow that reads them):
    they are computed for real, on the CPU, and only become meta where they meet a meta tensor.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in given):
            return func(*to_meta(args), **to_meta(kwargs))
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "meta":
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return to_meta(out) if isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) else out


class MetaAttention(TorchFunctionMode):
    """Lets attention on the meta device take the kernel that it would take on the CPU, so that both record the same ops."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not any(isinstance(a, Tensor) and a.is_meta for a in args[:3]):
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
    """Inputs of which the integer tensors on the meta device have values (twos: seldom a special token), on the CPU."""

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_meta or tensor.is_floating_point():
            return tensor
        return torch.full_like(tensor, 2 if tensor.dtype is not torch.bool else 1, device="cpu")

    return torch.utils._pytree.tree_map_only(Tensor, made, tree)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection for a while: a graph is many small objects, none of them garbage, and each full collection walks
    everything else that the process holds."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextlib.contextmanager
def quiet_run(model: nn.Module, seed: int, training: bool = False) -> Iterator[None]:
    """Eval (or training) mode, no gradients, a fixed seed; all of it put back afterwards.

    Never in inference mode, in which torch keeps ops in one piece that it takes apart elsewhere: a plan made there would not fit.
    Fused kernels that hide what a layer does are off: the fast path of transformer layers, and oneDNN's where there are
    recurrent layers. A model on the meta device runs on shapes alone (see `Meta`).

    What forward keeps on its modules (caches, counters, hooks) is taken away again, and so is what it puts in the place of
    their tensors' data. In training mode the values are put back as well: batch norms update theirs, and some code
    bounds its weights.
    """
    flags = {module: module.training for module in model.modules()}
    kept = [(held, held.copy()) for module in flags for held in _holders(module)]
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout is torch.strided)
    data = [(tensor, tensor.data) for tensor in tensors]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())] if training else []
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in flags)
    plain = torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    modes: list[Any] = [Meta(), MetaAttention()] if any(p.is_meta for p in model.parameters()) else []
    try:
        with contextlib.ExitStack() as stack:
            for context in (torch.random.fork_rng(devices=[]), _other_draws(seed), torch.inference_mode(False), torch.no_grad()):
                stack.enter_context(context)
            stack.enter_context(plain)
            for mode in modes:
                stack.enter_context(mode)
            torch.manual_seed(seed)
            torch.backends.mha.set_fastpath_enabled(False)
            model.train(training)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for held, before in kept:
            if isinstance(held, list):
                if len(held) != len(before) or any(a is not b for a, b in zip(held, before, strict=True)):
                    held[:] = before
            elif len(held) != len(before) or any(held.get(name) is not value for name, value in before.items()):
                held.clear()
                held.update(before)
        for module, flag in flags.items():
            module.training = flag
        for tensor, before in data:
            if tensor.data_ptr() != before.data_ptr() or tensor.shape != before.shape:
                tensor.data = before
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # a backward pass may wait for the others as they are
                    tensor.copy_(value)


@contextlib.contextmanager
def _other_draws(seed: int) -> Iterator[None]:
    """The same for what models draw by Python and NumPy (the masks of SpecAugment, say); their states are put back."""
    python, array = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _holders(module: nn.Module) -> Iterator[Any]:
    """What a module keeps things in: its attributes, and the dicts and lists among them (buffers, hooks, caches)."""
    yield module.__dict__
    for value in module.__dict__.values():
        if type(value) in (dict, OrderedDict, list):
            yield value
