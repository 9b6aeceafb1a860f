"""How surgeon runs a model: quietly, so that it comes back as it was, and on the meta device where it is too
big to be real.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils._pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.aliasing import written
from surgeon.capture.meta_run import Meta, MetaAttention, PlainMode
from surgeon.capture.paths.global_modes import answering
from surgeon.capture.paths.no_dropout import NoDropout
from surgeon.graph.graph import Decision
from surgeon.graph.nests import map_tensors


class Rescue(PlainMode):
    """Keeps the values that a run writes over of a model's tensors: all buffers (batch norms write into theirs
    without saying so), and of the parameters those that some op writes into.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.saved = {id(t): (t, t.detach().clone()) for t in model.buffers() if not t.is_meta}
        self.parameters: dict[int, list[Tensor]] = defaultdict(list)
        for tensor in model.parameters():
            if tensor.layout is torch.strided and not tensor.is_meta:
                self.parameters[tensor.untyped_storage()._cdata].append(tensor)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        for target in written(func, args, kwargs):
            if target.layout is torch.strided and not target.is_meta:
                for tensor in self.parameters.pop(target.untyped_storage()._cdata, ()):
                    self.saved[id(tensor)] = tensor, tensor.detach().clone()
        return func(*args, **kwargs)

    def put_back(self) -> None:
        """Give the tensors the values that they had."""
        with torch.no_grad():
            for tensor, value in self.saved.values():
                if not torch.equal(tensor, value):  # a backward pass may wait for the others as they are
                    tensor.copy_(value)


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
def quiet_run(
    model: nn.Module,
    seed: int,
    training: bool = False,
    answers: Mapping[str, bool] | None = None,
    asked: list[Decision] | None = None,
) -> Iterator[None]:
    """Eval (or training) mode, no gradients, no autocast, a fixed seed; all of it put back afterwards.

    Never in inference mode, in which torch keeps ops in one piece that it takes apart elsewhere: a plan made
    there would not fit. Fused kernels that hide what a layer does are off: the fast path of transformer
    layers, and oneDNN's where there are recurrent layers. A model on the meta device runs on shapes alone
    (see `Meta`).

    What forward keeps on its modules (caches, counters, hooks) is taken away again, and so is what it puts in
    the place of their tensors' data. In training mode the values are put back as well: batch norms update
    theirs, and some code bounds its weights. Dropouts are left out of a run in training mode.

    Args:
        answers, asked: what the model's code is told of global modes, and what it asks (see `global_modes`).
    """
    flags = {module: module.training for module in model.modules()}
    kept = [(held, held.copy()) for module in flags for held in _holders(module)]
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout is torch.strided)
    data = [(tensor, tensor.data) for tensor in tensors]
    rescue = Rescue(model) if training else None
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in flags)
    plain = torch.backends.mkldnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    modes: list[Any] = [Meta(), MetaAttention()] if any(p.is_meta for p in model.parameters()) else []
    modes += [NoDropout(), rescue] if rescue is not None else []
    try:
        with contextlib.ExitStack() as stack:
            contexts: tuple[contextlib.AbstractContextManager[Any], ...] = (
                torch.random.fork_rng(devices=[]),
                _other_draws(seed),
                torch.inference_mode(False),
                torch.no_grad(),
                *map(_without_autocast, _AUTOCAST),
                answering(model, answers or {}, asked),
                plain,
                *modes,
            )
            for context in contexts:
                stack.enter_context(context)
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
            elif len(held) != len(before) or any(
                held.get(name) is not value for name, value in before.items()
            ):
                held.clear()
                held.update(before)
        for module, flag in flags.items():
            module.training = flag
        for tensor, before in data:
            if tensor.data_ptr() != before.data_ptr() or tensor.shape != before.shape:
                tensor.data = before
        if rescue is not None:
            rescue.put_back()


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


def _holders(module: nn.Module) -> Iterator[Any]:
    """What a module keeps things in: its attributes, and the dicts and lists among them (buffers, hooks,
    caches).
    """
    yield module.__dict__
    for value in module.__dict__.values():
        if type(value) in (dict, OrderedDict, list):
            yield value
