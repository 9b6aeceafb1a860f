"""How surgeon runs a model: quietly, so that it comes back as it was, and on the meta device where it is too
big to be real.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.isolation.mode import Isolation
from surgeon.capture.isolation.snapshot import snapshots
from surgeon.capture.meta_run import Meta, MetaAttention, PlainMode
from surgeon.capture.paths.global_modes import answering
from surgeon.capture.paths.no_dropout import NoDropout
from surgeon.graph.graph import Decision
from surgeon.graph.module_tree import modules_of, parameters_of, registered_tensors
from surgeon.graph.nests import map_tensors
from surgeon.graph.process import LOCK, callers_device, deep_enough, plain_torch


def copies(inputs: Any) -> Any:
    """Copies of a model's inputs: it may write into a list (as SlowFast) or a tensor (as RCAN). One given
    twice is one again.
    """
    known: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return known.setdefault(id(tensor), tensor.clone())

    with _disable_current_modes():
        return map_tensors(inputs, copied)


def output_of(model: Any, args: Any, kwargs: Any) -> Any:
    """The model's output for copies of these inputs."""
    args, kwargs = copies((args, kwargs))
    return model(*args, **kwargs)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection for a while: a graph is many small objects, none of them garbage, and each full
    collection walks everything else that the process holds."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Uncollected, and with torch as it is by itself (see `plain_torch`)."""
    with uncollected(), plain_torch():
        yield


@contextlib.contextmanager
def quiet_run(
    model: nn.Module,
    seed: int,
    training: bool = False,
    answers: Mapping[str, bool] | None = None,
    asked: list[Decision] | None = None,
    isolated: bool = True,
    above: PlainMode | None = None,
) -> Iterator[None]:
    """Eval (or training) mode, no gradients, no autocast, draws that depend on the seed alone; all of it put back
    afterwards.

    The mode is set on the modules, not by `train()`: classes override that to merge weights, or to start a
    training. Never in inference mode, in which torch keeps ops in one piece that it takes apart elsewhere: a plan
    made there would not fit. Fused kernels and compiled code that hide what a layer does are off: the fast path
    of transformer layers, oneDNN's where there are recurrent layers, and what `torch.compile` made. A model on
    the meta device runs on shapes alone (see `Meta`).

    What forward changes is put back: tensors of any kind bit for bit, the lists, dicts and objects that modules
    hold, NumPy arrays, generators. One model runs at a time, whatever threads there are. Dropouts are left out of
    a run in training mode.

    Args:
        answers, asked: what the model's code is told of global modes, and what it asks (see `global_modes`).
        isolated: False for what cannot run under a torch mode (exporters): then the process's own generators are
            seeded and put back, and of tensors only what they are, not what they hold.
        above: the mode under which the model will run, together with a function mode; it hands on every op.
    """
    mode = Isolation(seed) if isolated else None
    with LOCK, deep_enough(model), contextlib.ExitStack() as stack:
        modules = modules_of(model)
        stack.enter_context(_kept(model, values=training and not isolated))
        stack.enter_context(_other_draws(seed))
        if mode is None:
            stack.enter_context(_fork_rng(seed))
        else:
            stack.callback(mode.restore)
        for context in _ways_to_run(modules, isolated, functions=above is not None):
            stack.enter_context(context)
        stack.enter_context(answering(modules, answers or {}, asked))
        if above is not None:
            above.beneath = mode
        elif mode is not None:
            stack.enter_context(mode)
        on_meta = any(p.is_meta for p in parameters_of(model))
        stack.enter_context(callers_device(on_meta))
        if on_meta:
            stack.enter_context(Meta())
            stack.enter_context(MetaAttention())
        if training:
            stack.enter_context(NoDropout())
        stack.enter_context(_in_mode(modules, training))
        yield


def _ways_to_run(modules: Sequence[nn.Module], isolated: bool, functions: bool) -> Iterator[Any]:
    """What decides how a model runs: no gradients, no fused kernels.

    Args:
        functions: whether a function mode will be there.
    """
    yield torch.inference_mode(False)
    yield torch.no_grad()
    yield from map(_without_autocast, _AUTOCAST)
    if not functions:  # under any function mode torch's transformer layers take no fused kernel
        yield _NoFastPath() if isolated else _fast_path_off()
    if any(isinstance(module, nn.RNNBase) for module in modules):
        yield torch.backends.mkldnn.flags(enabled=False)
    yield _uncompiled(modules)


class _NoFastPath(TorchFunctionMode):
    """While there is any function mode, torch's transformer layers take no fused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _in_mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """All modules in training or eval mode."""
    flags = [(module, module.training) for module in modules]
    try:
        for module, flag in flags:
            if flag is not training:
                module.training = training
        yield
    finally:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag


@contextlib.contextmanager
def _fast_path_off() -> Iterator[None]:
    """The same where no mode may be active."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _uncompiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules' own code instead of what `module.compile()` and `torch.compile(module)` made of it; `_kept`
    puts it back.
    """
    for module in modules:
        if "_compiled_call_impl" in module.__dict__:
            module.__dict__["_compiled_call_impl"] = None
        if "dynamo_ctx" in module.__dict__:
            inner = dict(module.named_children()).get("_orig_mod")
            if inner is not None:
                module.__dict__["forward"] = inner
    yield


@contextlib.contextmanager
def _kept(model: nn.Module, values: bool) -> Iterator[None]:
    """What a model holds and what its parameters and buffers are, put back afterwards; their values if asked."""
    held = snapshots(model)
    tensors = [t for t in registered_tensors(model) if t.layout is torch.strided]
    data = [(tensor, tensor.data) for tensor in tensors]
    numbers = [(tensor, tensor.detach().clone()) for tensor in tensors] if values else []
    try:
        yield
    finally:
        for put_back in held:
            put_back()
        for tensor, before in data:
            if tensor.data_ptr() != before.data_ptr() or tensor.shape != before.shape:
                tensor.data = before
        with torch.no_grad():
            for tensor, value in numbers:
                if not torch.equal(tensor, value):  # a backward pass may wait for the others as they are
                    tensor.copy_(value)


_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # kinds of devices


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """No autocast around a run: it would hand out weights that it has cast before, which no op shows."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


@contextlib.contextmanager
def _fork_rng(seed: int) -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _other_draws(seed: int) -> Iterator[None]:
    """The same for what models draw by Python and NumPy (the masks of SpecAugment, say); their states are put
    back.
    """
    python, array = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def python_draws() -> tuple[Any, Any]:
    """Where the generators of Python and of NumPy are."""
    return random.getstate(), np.random.get_state()


def drawn_since(before: tuple[Any, Any]) -> list[str]:
    """Which of the two have drawn numbers since."""
    python, array = python_draws()
    moved = array[2] != before[1][2] or not np.array_equal(array[1], before[1][1])
    return ["Python's random"] * (python != before[0]) + ["NumPy's random"] * moved
