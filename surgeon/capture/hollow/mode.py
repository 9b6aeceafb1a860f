"""HollowRun: a run whose products, and what follows from them, are tensors of the right shape that nobody computed.

A record needs sizes and the order of ops, and numbers only where the model's code reads some. The first op that makes
something else than floating-point numbers of a hollow tensor (a comparison, an index, a number for Python) raises
`NeedsValuesError`, and the model is run again for real. Hollow is only what hangs on the run's inputs and on weights:
what code makes of one of them alone, a table of positions say, it may keep for later runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from surgeon.capture.hollow.kernels import OTHERS, PRODUCTS, SHAPES_ALONE, SOUND_INDICES
from surgeon.capture.isolation.mode import Isolation
from surgeon.capture.meta_run import PlainMode
from surgeon.graph.module_tree import parameters_of, registered_tensors
from surgeon.graph.opaque_ops import HigherOrder

_FED, _HOLLOW = 1, 2


class NeedsValuesError(BaseException):
    """A hollow run reads a number that nobody computed. No `Exception`: the model's code must not catch it."""


class HollowRun(PlainMode):
    """Stands between a mode that sees every op and the one that isolates the run.

    Attributes:
        asked: whether a number was needed, even if the model's code caught the error.
    """

    def __init__(self, beneath: Isolation, inputs: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.beneath: Isolation = beneath
        self.asked = False
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._kinds: dict[int, int] = {}  # of storages
        self._alive: dict[int, Any] = {}  # weak references keep an address from being used again
        for tensor in inputs:
            self._mark(tensor, _FED)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kind = self._kind((*args, *kwargs.values()) if kwargs else args)
        if not kind:
            return self.beneath.call(func, args, kwargs)
        if isinstance(func, HigherOrder):
            self.ask()
        known = _facts(func)
        if kind == _HOLLOW and not known.takes_any_numbers:
            self.ask()
        kernel = self._kernel(known, kind, args)
        out = None if kernel is None else kernel(*args, **kwargs)
        if out is None:
            out = self.beneath.call(func, args, kwargs)
        else:
            kind = _HOLLOW
            if not known.writes:
                self.beneath.made(out)
        kind = _FED if known.shapes_alone else kind
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()):
                self._mark(item, kind)
            elif isinstance(item, Tensor) and (kind == _FED or known.sound_indices):
                self._mark(item, _FED)
            elif item is not None and kind == _HOLLOW:
                self.ask()
        if known.writes:
            for item in (*args, *kwargs.values()):
                if isinstance(item, Tensor):
                    self._mark(item, kind)
        return out

    def _kernel(self, known: _Facts, kind: int, args: Any) -> Callable[..., Any] | None:
        """What may take an op's place: of what follows from hollow tensors, and of products with weights."""
        if kind == _HOLLOW:
            return known.product or known.other
        if known.product is None:
            return None
        strided = [a for a in args if isinstance(a, Tensor) and a.layout is torch.strided]
        places = [a.untyped_storage()._cdata for a in strided]
        return None if self._weights.isdisjoint(places) else known.product

    def ask(self) -> None:
        """A number is needed.

        Raises:
            NeedsValuesError: always.
        """
        self.asked = True
        raise NeedsValuesError

    def reads(self, tensor: Tensor) -> None:
        """A tensor's numbers leave torch.

        Raises:
            NeedsValuesError: nobody computed them.
        """
        if self._kind((tensor,)) == _HOLLOW:
            self.ask()

    def _mark(self, tensor: Tensor, kind: int) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = StorageWeakRef(storage)
        self._kinds[key] = max(kind, self._kinds.get(key, 0))

    def _kind(self, items: Any) -> int:
        found = 0
        for item in items:
            if isinstance(item, Tensor):
                if item.layout is torch.strided:
                    found = max(found, self._kinds.get(item.untyped_storage()._cdata, 0))
            elif isinstance(item, tuple | list):
                found = max(found, self._kind(item))
            elif isinstance(item, dict):
                found = max(found, self._kind(item.values()))
        return found


_SOLVERS = (
    "linalg",
    "cholesky",
    "lu_",
    "svd",
    "ormqr",
    "geqrf",
    "lstsq",
)  # they may fail, or not come to an end


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a hollow run asks of an op.

    Attributes:
        product, other: what may take its place (see `PRODUCTS`, `OTHERS`), None if nothing may.
        takes_any_numbers: whether it may be run on numbers that mean nothing: none from outside of torch, which may
            trust them.
        writes: it writes to some of its arguments.
        shapes_alone, sound_indices: see `SHAPES_ALONE`, `SOUND_INDICES`.
    """

    product: Callable[..., Any] | None
    other: Callable[..., Any] | None
    takes_any_numbers: bool
    writes: bool
    shapes_alone: bool
    sound_indices: bool


@functools.cache
def _facts(func: Any) -> _Facts:
    name = str(func._schema.name).partition("::")[2].lstrip("_")
    return _Facts(
        PRODUCTS.get(func),
        OTHERS.get(func),
        func.namespace in ("aten", "prims") and not name.startswith(_SOLVERS),
        func._schema.is_mutable,
        func in SHAPES_ALONE,
        func in SOUND_INDICES,
    )


def hollow(mode: PlainMode, model: nn.Module, inputs: Iterable[Tensor]) -> HollowRun | None:
    """Make the run of a model under a mode, within `quiet_run`, a hollow one; None if it has no numbers, or lies on
    another device.
    """
    if not isinstance(mode.beneath, Isolation) or any(
        t.device.type != "cpu" for t in registered_tensors(model)
    ):
        return None
    made = HollowRun(mode.beneath, inputs, parameters_of(model))
    mode.beneath = made
    return made
