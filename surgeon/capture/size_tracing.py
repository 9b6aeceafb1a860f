"""Sizes that remember where they come from, so that a model's own arithmetic on shapes can be followed.

During capture `tensor.shape` and `tensor.size()` give whole numbers that know the value and dim that they
were read from, and keep knowing it through exact multiplication and division, and sums of such numbers. What
is done with them says which widths keep the same share (see `_follows`). These are ordinary ints in every
other respect, and gone after the capture.

While the small model is compared, sizes remember what they were (`CheckedInt`): code that checks a size shows
the number that must change with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep  # torch's own asserts decide nothing
_OWN_DIR = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclasses.dataclass(frozen=True)
class Follows:
    """A size that was computed from the size of `dim` of `node`."""

    node: fx.Node
    dim: int


class _Size(int):
    """A size that knows more than its value; what is kept of it or copied is the value.

    Raises:
        TypeError: for einops, which remembers what it computed of sizes (and does without where they have no
            hash): the next tensor of the same shape would get numbers of this one.
    """

    def __hash__(self) -> int:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("einops."):
            raise TypeError("a size that is traced has no hash here")
        return hash(int(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


class TracedInt(_Size):
    """A whole number with the dim that it was read from."""

    source: Follows

    def __new__(cls, value: int, source: Follows) -> TracedInt:
        made = super().__new__(cls, value)
        made.source = source
        return made

    def __floordiv__(self, other: Any) -> Any:
        return self._derived(int(self) // other, other) if int(self) % other == 0 else int(self) // other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, TracedInt) and int(self) == 1:  # a batch of one says nothing
            return TracedInt(int(other), other.source)
        return self._derived(int(self) * other, other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        return self._shifted(int(self) + other, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._shifted(int(self) - other, other)

    def __rsub__(self, other: Any) -> Any:
        self._compared(other)
        return other - int(self)

    def __neg__(self) -> TracedInt:
        return TracedInt(-int(self), self.source)

    def _shifted(self, value: Any, other: Any) -> Any:
        """A share of a size more or less is a share of it; so is nothing more. Any other number is a decision
        on it.
        """
        if (isinstance(other, TracedInt) and other.source == self.source) or (
            type(other) is int and not other
        ):
            return TracedInt(value, self.source)
        self._compared(other, depth=3)
        return value

    def _derived(self, value: Any, other: Any) -> Any:
        if isinstance(value, int) and (not isinstance(other, TracedInt) or int(other) == 1):
            return TracedInt(value, self.source)
        return value

    def _compared(self, other: Any, depth: int = 2) -> None:
        """The code decides on a size: another size may take it elsewhere."""
        if not isinstance(other, TracedInt) and not sys._getframe(depth).f_code.co_filename.startswith(
            _TORCH_DIR
        ):
            self.source.node.meta.setdefault("decided", set()).add(self.source.dim)

    def __eq__(self, other: object) -> bool:
        self._compared(other)
        return bool(int(self) == other)

    def __ne__(self, other: object) -> bool:
        self._compared(other)
        return bool(int(self) != other)

    def __lt__(self, other: Any) -> bool:
        self._compared(other)
        return bool(int(self) < other)

    def __le__(self, other: Any) -> bool:
        self._compared(other)
        return bool(int(self) <= other)

    def __gt__(self, other: Any) -> bool:
        self._compared(other)
        return bool(int(self) > other)

    def __ge__(self, other: Any) -> bool:
        self._compared(other)
        return bool(int(self) >= other)

    def __mod__(self, other: Any) -> Any:
        self._compared(other)
        return int(self) % other

    __hash__ = _Size.__hash__


class CheckedInt(_Size):
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

    __hash__ = _Size.__hash__


_PRODUCTS = {  # torch makes them of other ops where a size is 1, or by how the operands lie in memory
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.einsum, torch.tensordot, torch.linalg.multi_dot,
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip


class Sizes(TorchFunctionMode):
    """Hands out sizes of tensors as other ints, and numbers the products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        """What the code gets for one size."""
        raise NotImplementedError

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        """Run a product and give what it gives; `number` counts them from 1."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.products += 1
            return self.product(self.products, lambda: func(*args, **(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "size" and isinstance(result, int):
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return self.one(args[0], dim % args[0].dim(), result)
        if name == "size" or (name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.shape):
            return torch.Size([self.one(args[0], dim, n) for dim, n in enumerate(result)])
        return result


@contextlib.contextmanager
def looking_inside_functional() -> Iterator[None]:
    """Let a function mode see the ops inside torch's own Python functions (such as
    multi_head_attention_forward).
    """
    module = torch.nn.functional
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, lambda *_: False)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
