"""CheckedInt: a size of the small model that knows what it was in the original."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from surgeon.capture.sizes.traced_size import Size

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep


class CheckedInt(Size):
    """A size of the small model that remembers what it was: where code compares it with that, it is told that
    it is still so.

    Args:
        old: the size of the original.
        stale: told of such a comparison: "eq" or "ne", the old size, the new one.
    """

    old: int
    stale: Callable[[str, int, int], None]

    def __new__(cls, value: int, old: int, stale: Callable[[str, int, int], None]) -> CheckedInt:
        made = super().__new__(cls, value)
        made.old, made.stale = old, stale
        return made

    def _is_stale(self, op: str, other: object) -> bool:
        if type(other) is not int or other != self.old or self.old == int(self):
            return False
        if sys._getframe(2).f_code.co_filename.startswith((_TORCH_DIR, _OWN_DIR)):
            return False
        self.stale(op, self.old, int(self))
        return True

    def __eq__(self, other: object) -> bool:
        return self._is_stale("eq", other) or int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self._is_stale("ne", other) and int(self) != other

    __hash__ = Size.__hash__
