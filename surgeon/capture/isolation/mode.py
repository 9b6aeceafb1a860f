"""Isolation: a mode under which a model's run leaves no trace in tensors that were there before, nor in generators."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor

from surgeon.capture.meta_run import PlainMode
from surgeon.graph.arguments import Arguments


class Isolation(PlainMode):
    """Sees every op of a run.

    Memory that was there before the run is copied before the first op that writes to it, and written back by
    `restore`. What is drawn at random is drawn from generators of the run's own, so that the draws do not depend
    on what else the process draws, nor the other way round.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._made: set[int] = set()  # where memory begins that ops of this run made
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not isinstance(
            func, torch._ops.OpOverload
        ):  # an operator that takes functions: what they run comes by itself
            return func(*args, **kwargs)
        known = _facts(func)
        if known.mode is None or known.of(known.mode, args, kwargs) is not False:
            for argument in known.written:
                self._save(known.of(argument, args, kwargs))
        result = self._drawn(func, args, kwargs) if known.draws else func(*args, **kwargs)
        if known.makes:
            self.made(result)
        return result

    def made(self, result: Any) -> None:
        """What this run made, in new memory."""
        for item in result if type(result) in (tuple, list) else (result,):
            for tensor in item if type(item) in (tuple, list) else (item,):
                if isinstance(tensor, Tensor):
                    self._made.add(_place(tensor))

    def restore(self) -> None:
        """Write back what was there before; a backward pass that waits for it finds it unchanged."""
        for storage, before in self._saved.values():
            if storage.nbytes() != before.nbytes():
                storage.resize_(before.nbytes())
            storage.copy_(before)
        versions = [*self._versions.values()][
            ::-1
        ]  # views count with their bases, the first of them as it was
        torch._C._autograd._unsafe_set_version_counter(
            tuple(tensor for tensor, _ in versions), tuple(version for _, version in versions)
        )
        self._saved.clear()
        self._versions.clear()

    def _save(self, target: Any) -> None:
        for tensor in target if isinstance(target, list | tuple) else [target]:
            place = _place(tensor) if isinstance(tensor, Tensor) else 0
            if not place or place in self._made:
                continue
            if not tensor.is_inference():
                self._versions.setdefault(id(tensor), (tensor, tensor._version))
            if place not in self._saved:
                storage = tensor.untyped_storage()
                self._saved[place] = storage, storage.clone()

    # -- draws -----------------------------------------------------------------------------------------------

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = _device(args, kwargs)
        if device.type == "meta" or Arguments(func, args, kwargs).get("dropout_p") == 0:  # nothing is drawn
            return func(*args, **kwargs)
        generator = self._generator(device)
        seeded = _with_generator(func)
        if seeded is not None and kwargs.get("generator") is None:
            return seeded(*args, **kwargs, generator=generator)
        if func is torch.ops.aten.native_dropout.default:
            return _dropout(*args, **kwargs, generator=generator)
        if seeded is not None:  # the model's own generator
            return func(*args, **kwargs)
        return _with_state(generator, lambda: func(*args, **kwargs))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _place(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 if it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What an op does to memory and to generators.

    Attributes:
        written: (place, name) of the arguments that it writes to; batch norms do not say that they write their
            statistics.
        mode: the argument that says whether it writes; None if it always does.
        makes: what it returns lies in new memory.
        draws: it draws numbers at random.
    """

    written: tuple[tuple[int, str], ...]
    mode: tuple[int, str] | None
    makes: bool
    draws: bool

    @staticmethod
    def of(argument: tuple[int, str], args: Any, kwargs: Any) -> Any:
        """The value of an argument; None if its default counts."""
        place, name = argument
        return args[place] if place < len(args) else kwargs.get(name)


_STATISTICS = ("running_mean", "running_var")


@functools.cache
def _facts(func: Any) -> _Facts:
    declared = list(enumerate(func._schema.arguments))
    said = tuple((i, a.name) for i, a in declared if a.alias_info is not None and a.alias_info.is_write)
    unsaid = tuple((i, a.name) for i, a in declared if a.name in _STATISTICS and (i, a.name) not in said)
    modes = [(i, a.name) for i, a in declared if a.name in ("training", "train")]
    return _Facts(
        written=(*said, *unsaid),
        mode=modes[0] if unsaid and not said and modes else None,
        makes=func.namespace in ("aten", "prims") and all(r.alias_info is None for r in func._schema.returns),
        draws=torch.Tag.nondeterministic_seeded in func.tags,
    )


@functools.cache
def _with_generator(func: Any) -> Any:
    """The op, or the one of its overloads, that takes a generator and else the same; None if there is none."""
    names = [a.name for a in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in packet.overloads():
        other = getattr(packet, overload)
        more = [a.name for a in other._schema.arguments]
        if "generator" in more and [name for name in more if name != "generator"] == names:
            return other
    return None


def _device(args: Any, kwargs: Any) -> torch.device:
    given = kwargs.get("device")
    if given is not None:
        return torch.device(given)
    tensors = (t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def _dropout(
    x: Tensor, p: float, train: bool | None = None, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return x * mask * (1 / (1 - p)), mask


def _with_state(generator: torch.Generator, run: Any) -> Any:
    """Run an op that knows no generator but the device's own, with the state of another one."""
    own = _default_generator(generator.device)
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        return run()
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
