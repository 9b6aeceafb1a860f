"""A mode that hands out sizes that remember where they come from, so that a model's own arithmetic on shapes can
be followed.

During capture `tensor.shape` and `tensor.size()` give whole numbers that know the value and dim that they were
read from (`TracedInt`). What is done with them says which widths keep the same share (see `dependencies`),
and where the code decides on a size. These are ordinary ints in every other respect, and gone after the capture.

While the small model is compared, sizes remember what they were (`CheckedInt`): code that checks a size shows
the number that must change with it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor
from torch.overrides import TorchFunctionMode

from surgeon.capture.control_flow import IN_PYTHON
from surgeon.graph.process import LOCK
from surgeon.graph.python_calls import DROPOUTS

_PRODUCTS = {  # torch makes them of other ops where a size is 1, or by how the operands lie in memory
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.einsum, torch.tensordot, torch.linalg.multi_dot,
    torch.nn.functional.linear, torch.nn.functional.bilinear, torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip


def rate_of_dropout(name: str, args: Any) -> Any:
    """The rate that a dropout of torch is called with, by its layers as well; None if the call is of something else."""
    return args[1] if name in DROPOUTS and len(args) > 1 else None  # (input, rate, training)


def inside_transform() -> bool:
    """Whether a transform such as `vmap` runs: sizes are those of one sample there, and the ops are on all of them."""
    return torch._C._functorch.peek_interpreter_stack() is not None


_LEAVE = frozenset(("numpy", "tolist", "__array__", "__dlpack__"))  # what they give is none of torch's


class Sizes(TorchFunctionMode):
    """Hands out sizes of tensors as other ints, and numbers the products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        """What the code gets for one size."""
        raise NotImplementedError

    def read(self, how: str, tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """What the code gets of values that leave torch: `function(tensor)`, or what it gives for others."""
        return function(tensor)

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        """Run a product and give what it gives; `number` counts them from 1."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if inside_transform():
            return func(*args, **(kwargs or {}))
        if func in IN_PYTHON:
            with self:
                return IN_PYTHON[func](*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _LEAVE and isinstance(args[0], Tensor):
            return self.read(name, args[0], lambda tensor: func(tensor, *args[1:], **(kwargs or {})))
        if func in _PRODUCTS:
            self.products += 1
            return self.product(self.products, lambda: func(*args, **(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        if name == "size" and isinstance(result, int):
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return self.one(args[0], dim % args[0].dim(), result)
        if name == "size" or (name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.shape):
            return torch.Size([self.one(args[0], dim, n) for dim, n in enumerate(result)])
        return result


_inside = threading.local()
_PATCHED = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_originals: dict[str, Any] = {}
_users = 0


@contextlib.contextmanager
def looking_inside_functional() -> Iterator[None]:
    """Let a function mode see the ops inside torch's own Python functions (such as
    multi_head_attention_forward).

    Those ask functions of `torch.nn.functional` whether to hand themselves over; in this thread the answer is no.
    """
    global _users
    with LOCK:
        if not _users:
            _patch()
        _users += 1
    before = getattr(_inside, "depth", 0)
    _inside.depth = before + 1
    try:
        yield
    finally:
        _inside.depth = before
        with LOCK:
            _users -= 1
            if not _users:
                vars(torch.nn.functional).update(_originals)


def _patch() -> None:
    module = torch.nn.functional
    _originals.update({name: getattr(module, name) for name in _PATCHED if hasattr(module, name)})
    for name, function in _originals.items():
        setattr(module, name, functools.partial(_answer, function))


def _answer(function: Callable[..., bool], *args: Any) -> bool:
    return not getattr(_inside, "depth", 0) and function(*args)
