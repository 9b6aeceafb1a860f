"""How far rounding alone moves a model: the original's own run, with each of its numbers moved in the last bit.

Trained networks with large gains carry a last bit far: two runs that compute the same in another order differ
by more than the usual limit of a proof. The limit is then raised to a multiple of what is measured, value by
value, on the original with the plan's channels absent; nothing of the small model enters, so that an error of
the cut cannot raise its own limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.utils._pytree
from torch import Tensor, fx

from surgeon.ops import masks
from surgeon.ops.masked_op import wide
from surgeon.proof.reference import Reference, distance

FACTOR = 16  # a sum in another order rounds at each of its steps, a moved number once
HIGHEST = 1e-3  # where rounding alone may change more, a proof shows nothing
_DRAWS = 3

K = TypeVar("K")
Make = Callable[[Mapping[fx.Node, Tensor], Mapping[str, Tensor]], Reference]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The relative errors that are allowed: of products by node, of outputs by path; `usual` for others.

    Attributes:
        silent: nodes and paths of values that rounding alone changes by more than any limit: sums that cancel, such as the
            mean of what a batch norm gives for one sample. A run shows nothing of them.
    """

    usual: float
    products: Mapping[fx.Node, float] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    silent: frozenset[fx.Node | str] = frozenset()

    def first_above(self, errors: Mapping[fx.Node, float]) -> fx.Node | None:
        """The first product, in the order of the run, whose error is too large; of those that are shown."""
        return next((n for n in self._above(self.products, errors) if n not in self.silent), None)

    def worst_above(self, errors: Mapping[str, float]) -> str | None:
        """The output that is furthest off, if one is too far; of those that are shown."""
        above = [path for path in self._above(self.outputs, errors) if path not in self.silent]
        return max(above, key=lambda path: (errors[path] != errors[path], errors[path]), default=None)

    def unshown(
        self, products: Mapping[fx.Node, float], outputs: Mapping[str, float]
    ) -> frozenset[fx.Node | str]:
        """The values whose error is too large and says nothing."""
        return self.silent.intersection(
            (*self._above(self.products, products), *self._above(self.outputs, outputs))
        )

    def _above(self, limits: Mapping[K, float], errors: Mapping[K, float]) -> list[K]:
        return [key for key, error in errors.items() if not error <= limits.get(key, self.usual)]

    @property
    def highest(self) -> float:
        """The largest limit of a value that is shown."""
        known = [*self.products.items(), *self.outputs.items()]
        return max((self.usual, *(limit for key, limit in known if key not in self.silent)))


def limits(
    make: Make,
    usual: float,
    products: Sequence[fx.Node],
    tensors: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
) -> Limits:
    """The limits of a proof, raised where rounding moves the original by more.

    Args:
        make: a reference that compares its products with given ones and takes given tensors for its own.
        products: the nodes that the proof compares.
        tensors: the original's parameters and buffers, as the proof reads them.
    """
    first = make(dict.fromkeys(products, torch.empty(0)), tensors)
    first.keeps = True
    outputs = first.run(args, kwargs)
    found_products, found_outputs = dict[fx.Node, float](), dict[str, float]()
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        moved = {name: _moved(generator, wide(tensor.detach())) for name, tensor in tensors.items()}
        inputs = torch.utils._pytree.tree_map_only(Tensor, partial(_moved, generator), (args, kwargs))
        second = make(first.present, moved)
        for (path, (want, mask)), (_, (got, _)) in zip(outputs, second.run(*inputs), strict=True):
            present = masks.full(mask, want.shape)
            error = distance(path, want[present], (), got[present])
            found_outputs[path] = max(found_outputs.get(path, 0.0), error)
        for node, error in second.errors.items():
            found_products[node] = max(found_products.get(node, 0.0), error)
    silent = {
        key for found in (found_products, found_outputs) for key, error in found.items() if error > HIGHEST
    }
    return Limits(usual, _raised(found_products, usual), _raised(found_outputs, usual), frozenset(silent))


def _raised(found: Mapping[K, float], usual: float) -> dict[K, float]:
    return {key: max(usual, min(FACTOR * error, HIGHEST)) for key, error in found.items()}


def _moved(generator: torch.Generator, tensor: Tensor) -> Tensor:
    """The numbers moved in the last bit, up or down at random; whole numbers as they are."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device) * 2 - 1
    return tensor * (1 + up.to(tensor.dtype) * torch.finfo(tensor.dtype).eps)
