"""TrainingReads: whether the code of a model asks if it is in training mode, seen while it runs.

Code that never asks runs the same in training mode, so that no run in that mode is needed. What torch's own batch
norms and dropouts ask does not count: norms tie the same channels in both modes, and dropouts are left out.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.paths.sample_scaling import is_bare, scales_samples

_KNOWN = frozenset(
    kind.forward.__code__
    for kind in (
        nn.modules.batchnorm._BatchNorm,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
        nn.MultiheadAttention,  # for its dropout, and for a fused kernel that is off
    )
)
_FLAG = "training"


class TrainingReads:
    """While it is entered, whoever asks a module for its mode is noted.

    It stands in `nn.Module` in the place of an attribute: reads and writes go through it to the module's own flag.

    Attributes:
        any: whether something asked, or changed the mode of a module. So it counts as well if a class has a flag of
            its own, which this does not see, or is of TorchScript.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.any = any(map(_has_its_own, {type(module) for module in modules}))
        self._thread = threading.get_ident()
        self._others: set[nn.Module] = set()  # of which code that is not their own asked
        self._bare: dict[tuple[nn.Module, tuple[int, ...], torch.dtype], None] = {}

    def scaling(self) -> list[nn.Module]:
        """The modules that ask for themselves and only scale samples (stochastic depth): they tie nothing.

        Called when the run is over; if there are others of which no one knows that, `any` is true then.
        """
        known = {item: scales_samples(*item) for item in self._bare}
        wrong = {module for (module, *_), scales in known.items() if not scales}
        self.any = self.any or bool(wrong)
        return [*dict.fromkeys(module for module, *_ in self._bare if module not in wrong | self._others)]

    def __enter__(self) -> TrainingReads:
        self._before = nn.Module.__dict__.get(
            _FLAG
        )  # one of another thread, if a model runs within another's run
        setattr(nn.Module, _FLAG, self)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is None:
            delattr(nn.Module, _FLAG)
        else:
            setattr(nn.Module, _FLAG, self._before)

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        if module is None:
            raise AttributeError(_FLAG)
        frame = sys._getframe(1)
        if (
            frame.f_code not in _KNOWN
            and threading.get_ident() == self._thread
            and module not in self._others
        ):
            self._asked(module, frame)
        try:
            return module.__dict__[_FLAG]
        except KeyError:
            raise AttributeError(_FLAG) from None

    def _asked(self, module: nn.Module, frame: types.FrameType) -> None:
        given = [value for value in frame.f_locals.values() if isinstance(value, Tensor)]
        itself = frame.f_code is getattr(type(module).forward, "__code__", None)
        if itself and len(given) == 1 and is_bare(module) and frame.f_locals.get("self") is module:
            shape = tuple(int(n) for n in given[0].shape)  # sizes are traced here
            self._bare[module, shape, given[0].dtype] = None
        else:
            self.any = True
            self._others.add(module)

    def __set__(self, module: nn.Module, value: Any) -> None:
        if threading.get_ident() == self._thread:
            self.any = True
        module.__dict__[_FLAG] = value


def _has_its_own(kind: type[nn.Module]) -> bool:
    """Whether the flag of a class is not that of `nn.Module`."""
    if issubclass(kind, torch.jit.ScriptModule):
        return True
    return any(_FLAG in vars(base) for base in kind.__mro__ if base is not nn.Module)
