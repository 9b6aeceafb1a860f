"""Decisions: ops whose result hangs on the order or the exact value of numbers (a sort, a threshold, an item
that Python reads).

A last-bit difference of the input may change such a result altogether, and with it the shapes and the path of
all that follows. So the recorder keeps what they gave, and later runs of the small model and of the reference
take the same decisions: what they compute is then comparable, number by number.

For the same reason all that is drawn at random (noise, a dropout that never ends) is one number while a cut
is proved: draws of other sizes are other draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, fx

from surgeon.graph.graph import Read

_LIMIT = 1 << 22  # results larger than this are not kept
_ORDERS = frozenset(("sort", "topk"))
_CHOICES = frozenset(
    "argsort argmax argmin bucketize searchsorted multinomial nonzero _local_scalar_dense _to_copy gt ge lt le eq ne".split()
)


_DRAWS = frozenset(
    "bernoulli exponential normal normal_functional rand rand_like randn randn_like uniform".split()
)
DRAWN = 0.5


def draws(name: str) -> bool:
    """Whether an ATen op, by name, draws numbers at random."""
    return name.rstrip("_") in _DRAWS


_CONVERT = torch.ops.aten._to_copy.default


class RecordedReads:
    """Hands out, read by read, the values that left torch in the recorded run."""

    def __init__(self, reads: Sequence[Read]) -> None:
        self.rest = list(reads)[::-1]

    def value(self, tensor: Tensor) -> Tensor:
        """What the code is to get for this tensor: the recorded values, if they are of its shape."""
        recorded = self.rest.pop().value if self.rest else tensor
        return recorded.clone() if recorded.shape == tensor.shape else tensor


def decides(op: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op turns numbers into a decision; ops from outside ATen (such as torchvision::nms) may do
    so.
    """
    if op is _CONVERT and (kwargs.get("dtype") is None or kwargs["dtype"].is_floating_point):
        return False
    return _may_decide(op) and any(
        a.is_floating_point() for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)
    )


@cache
def _may_decide(op: Any) -> bool:
    space, _, name = op._schema.name.partition("::")
    return name in _ORDERS | _CHOICES or space not in ("aten", "prims")


def decision(out: Any) -> Any:
    """What to keep of a deciding op's result: whole numbers and truth values, by position; None for the
    rest.
    """
    if isinstance(out, Tensor):
        plain = (
            not out.is_floating_point() and not out.is_complex() and out.numel() <= _LIMIT and not out.is_meta
        )
        return out.detach().clone() if plain else None
    return tuple(map(decision, out)) if isinstance(out, list | tuple) else out


def replay(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The decision that was recorded at `node`, with the values that it orders read anew from `args`.

    None if it must be taken again: none was recorded, or it ranged over channels that were cut.
    """
    kept: Any = node.meta.get("decision")
    name = node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]  # only ATen ops and kin hold decisions
    given = [item for item in torch.utils._pytree.tree_leaves(args) if isinstance(item, Tensor)]
    if [tuple(t.shape) for t in given] != [n.meta["spec"].shape for n in node.all_input_nodes]:
        return None
    if name in _ORDERS:
        if kept[1] is None:
            return None
        place = {"topk": 2, "sort": 1}[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        return args[0].gather(dim, kept[1]), kept[1].clone()
    if any(item is None for item in torch.utils._pytree.tree_leaves(kept, is_leaf=lambda item: item is None)):
        return None
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, kept)
