"""TrainingReads: whether the code of a model asks if it is in training mode, seen while it runs.

Code that never asks runs the same in training mode, so that no run in that mode is needed. What torch's own batch
norms and dropouts ask does not count: norms tie the same channels in both modes, and dropouts are left out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

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
        if sys._getframe(1).f_code not in _KNOWN and threading.get_ident() == self._thread:
            self.any = True
        try:
            return module.__dict__[_FLAG]
        except KeyError:
            raise AttributeError(_FLAG) from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        if threading.get_ident() == self._thread:
            self.any = True
        module.__dict__[_FLAG] = value


def _has_its_own(kind: type[nn.Module]) -> bool:
    """Whether the flag of a class is not that of `nn.Module`."""
    if issubclass(kind, torch.jit.ScriptModule):
        return True
    return any(_FLAG in vars(base) for base in kind.__mro__ if base is not nn.Module)
