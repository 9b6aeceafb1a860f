"""MaskedOp: one op at work on values of which some entries are absent, as data, as masks, or with zero in the
absent entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.errors import ProofError
from surgeon.graph.arguments import Arguments
from surgeon.graph.messages import where
from surgeon.ops import masks
from surgeon.ops.masks import Mask
from surgeon.ops.table import Family, Trait, defaults, has, in_float64


def leak(x: Tensor) -> Tensor:
    """What is added to a saturating activation of x, so that no channel is zero throughout.

    Never negative: code divides by sums of such activations (linear attention) and takes roots of them.
    """
    return x.abs()


def widened(item: Any) -> Any:
    """float64 (complex128) for every float dtype in an op's arguments."""
    if isinstance(item, torch.dtype):
        return torch.float64 if item.is_floating_point else torch.complex128 if item.is_complex else item
    return tuple(map(widened, item)) if isinstance(item, tuple) else item


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64 or complex128; others (of whole numbers, say) as they are."""
    return tensor.to(widened(tensor.dtype))


def by_default_float64(target: Any) -> Any:
    """The op as it computes where float64 is torch's default dtype, without setting it for the whole process."""
    return functools.partial(_by_default_float64, in_float64(target))


def _by_default_float64(func: Any, *args: Any, **kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    schema = getattr(func, "_schema", None)
    if schema is None or not is_narrow(result) or any(map(is_narrow, (*args, *kwargs.values()))):
        return result
    names = [a.name for a in schema.arguments]
    if "dtype" in names[len(args) :] and kwargs.get("dtype") is None:
        return func(*args, **{**kwargs, "dtype": widened(result.dtype)})
    for also_bool in (False, True):  # whole numbers that meet a number, or whose root is taken
        if is_narrow(result):
            result = func(*(_as_wide(item, also_bool) for item in args), **kwargs)
    return result


def is_narrow(item: Any) -> bool:
    """Whether something is a tensor of real or complex numbers in less than float64."""
    return isinstance(item, Tensor) and widened(item.dtype) != item.dtype


def _as_wide(item: Any, also_bool: bool) -> Any:
    if not isinstance(item, Tensor) or (item.dtype is torch.bool and not also_bool):
        return item
    return item.clone() if item.is_floating_point() or item.is_complex() else item.double()


class MaskedOp:
    """One op at work: its arguments as data, as masks, or as zeroed data."""

    def __init__(self, node: fx.Node, name: str, given: Arguments, values: Mapping[fx.Node, Any]) -> None:
        self.node, self.name, self.arguments, self.values = node, name, given, values

    def __getitem__(self, name: str) -> Any:
        """The value of an argument by its name in the op's schema; a node for a tensor."""
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """The same; None if the schema has no such argument."""
        return self.arguments.get(name)

    def data(self, item: Any) -> Any:
        return self.values[item][0] if isinstance(item, fx.Node) else item

    def mask(self, item: Any) -> Mask:
        return self.values[item][1] if isinstance(item, fx.Node) else ()

    def zeroed(self, item: Any) -> Any:
        return masks.zeroed(*self.values[item]) if isinstance(item, fx.Node) else item

    def present(self, item: Any) -> Any:
        """Which entries are present, as one full tensor."""
        return masks.full(self.mask(item), self.data(item).shape) if isinstance(item, fx.Node) else item

    def run(self, read: Callable[[Any], Any]) -> Any:
        """The op on its arguments as `read` gives them."""
        args = [nest(a, read) for a in self.arguments.args]
        kwargs = {k: widened(nest(v, read)) for k, v in self.arguments.kwargs.items()}
        return self.op(*map(widened, args), **kwargs)

    def on(self, node: fx.Node, data: Tensor) -> Any:
        """The op with other numbers in place of one of its operands."""
        return self.run(lambda item: data if item is node else self.data(item))

    @property
    def op(self) -> Any:
        """The op itself; views as reshapes, because the reference's layouts in memory may differ."""
        viewed = has(self.name, Trait.RESHAPES) and "size" in self.arguments
        return torch.reshape if viewed else by_default_float64(self.node.target)

    @property
    def masked(self) -> bool:
        return any(
            self.values[n][1] for n in self.node.all_input_nodes if isinstance(self.values[n][1], tuple)
        )

    def outputs(self, result: Any, mask: Mask) -> Any:
        """The result with its mask; further outputs (indices, statistics) share it where their shape
        allows.
        """
        if isinstance(result, list | tuple):
            return [
                (r, mask if i == 0 or (isinstance(r, Tensor) and r.shape == result[0].shape) else ())
                for i, r in enumerate(result)
            ]
        return result, mask


def nest(item: Any, read: Callable[[Any], Any]) -> Any:
    if isinstance(item, list | tuple):
        return type(item)(nest(x, read) for x in item)
    return read(item)


def refusal(call: MaskedOp, why: str) -> ProofError:
    return ProofError(
        f"the cut cannot be proved at op {call.name}", where=where(call.node), why=why,
        fix="keep the layer with ignore=[...], or report the model: a rule is missing",
    )  # fmt: skip


def unchanged(call: MaskedOp) -> Any:
    """An op of which is not known what it computes when entries are gone: none may be."""
    if call.masked:
        raise refusal(call, "it reads a tensor that lost entries, and the proof does not know how")
    result = call.run(call.data)
    return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())


defaults(Family.OPAQUE, absent=unchanged)
