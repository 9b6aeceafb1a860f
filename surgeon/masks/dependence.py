"""dependence(call, depends, result) -> which entries of an op's result hang on the model's inputs.

An entry that hangs on no input is a constant, whatever the model is given: a filter of zeros behind a batch norm and an
activation, say. That a number was the same in some runs shows nothing; so this is read off zeros in weights and off
how each family of ops makes its results, and is `True` wherever that is not known. An activation that happens to be zero for
the inputs at hand is no constant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.capture.value_dependent import draws
from surgeon.graph.arguments import arguments
from surgeon.ops.context import OpContext
from surgeon.ops.ids import Constraints
from surgeon.ops.masked_op import MaskedOp
from surgeon.ops.product import Product
from surgeon.ops.table import Family, Trait, bound, family, has

Depends = Mapping[fx.Node, Any]  # node -> a boolean tensor of its shape, or a list of them


def dependence(call: MaskedOp, depends: Depends, result: Any, fed: Collection[fx.Node]) -> Any:
    """A boolean tensor like the result: whether each entry hangs on the inputs; a list of them for several results.

    Args:
        depends: the same of what the op reads.
        result: what the op gave.
        fed: the values that are made of inputs.
    """
    results = list(result) if isinstance(result, list | tuple) else [result]
    if _draws(call) or not isinstance(call.node.target, torch._ops.OpOverload):
        found = [_all(item, True) for item in results]
    elif _pads(call):
        found = _found(call, _Unlike(call, depends), results)
    elif any(_any(depends[node]) for node in call.node.all_input_nodes):
        found = _found(call, depends, results)
    else:
        found = [_all(item, False) for item in results]
    if _counts_places(call, fed):
        found = [
            held | (item != 0) if isinstance(item, Tensor) and held is not None else held
            for held, item in zip(found, results, strict=True)
        ]
    return found if isinstance(result, list | tuple) else found[0]


def _pads(call: MaskedOp) -> bool:
    """Whether an op puts zeros around places: what is made of a constant there differs from place to place, by the size.

    Padding of a maximum, and what repeats places, give equal numbers of equal ones.
    """
    sums = family(call.name) is not Family.REDUCTION or "count_include_pad" in call.arguments
    given = call.arguments.get("padding", call.arguments.get("pad"))
    return sums and isinstance(given, list | tuple) and any(isinstance(size, int) and size for size in given)


class _Unlike(Mapping[fx.Node, Any]):
    """What operands hang on, where places differ: data other than zero count as hanging on the inputs; weights do not."""

    def __init__(self, call: MaskedOp, depends: Depends) -> None:
        self._depends = depends
        self._data = call.get("input|self"), call.data(call.get("input|self"))

    def __getitem__(self, node: fx.Node) -> Any:
        found = self._depends[node]
        return found | (self._data[1] != 0) if node is self._data[0] else found

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self._depends)

    def __len__(self) -> int:
        return len(self._depends)


def _draws(call: MaskedOp) -> bool:
    """Whether an op draws at random; attention with a dropout of 0 does not."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(call.node.target, "tags", ())
    return draws(call.name) or (tagged and call.arguments.get("dropout_p") != 0)


def _counts_places(call: MaskedOp, fed: Collection[fx.Node]) -> bool:
    """Whether numbers of the result hang on the sizes of inputs: sums over places, parts and tables as long as an input is.

    Zeros do not: a sum of them is zero however many they are.
    """
    own = family(call.name)
    if own is Family.CONTRACTION:
        return len(call.node.all_input_nodes) > 1 and all(node in fed for node in call.node.all_input_nodes)
    if own is Family.REDUCTION:
        return not has(call.name, Trait.AVERAGES)
    return own is Family.FACTORY or has(call.name, Trait.SLICES)


def _found(call: MaskedOp, depends: Depends, results: list[Any]) -> list[Any]:
    own = family(call.name)
    rule = {
        Family.MOVEMENT: _moved,
        Family.ELEMENTWISE: _elementwise,
        Family.REDUCTION: _reduced,
        Family.CONTRACTION: _contracted,
    }.get(own)
    first = None if rule is None else rule(call, depends, results)
    if isinstance(first, list):
        return first
    if first is None:
        return [_all(item, True) for item in results]
    same = [isinstance(item, Tensor) and item.shape == first.shape for item in results]
    return [first if alike else _all(item, True) for item, alike in zip(results, same, strict=True)]


def mixed_dims(node: fx.Node) -> Mapping[fx.Node, set[int]]:
    """Operand -> the dims that the op sums, orders, normalises or looks through a window along."""
    return OpContext(node, {}, Constraints()).mixed


def some(data: Tensor, dims: Any) -> Tensor:
    """Whether any entry along some dims is not zero; the dims stay, with size 1."""
    dims = tuple(dims)
    return (data != 0).any(dims, keepdim=True) if dims else data != 0


def nonzero(call: MaskedOp, depends: Depends, item: fx.Node) -> Tensor:
    """Which entries of an operand may be other than zero for some input."""
    found: Tensor = (call.data(item) != 0) | depends[item]
    return found


def _any(held: Any) -> bool:
    return any(map(_any, held)) if isinstance(held, list | tuple) else held is not None and bool(held.any())


def _all(item: Any, answer: bool) -> Tensor | None:
    return torch.full(item.shape, answer, device=item.device) if isinstance(item, Tensor) else None


def _moved(call: MaskedOp, depends: Depends, results: list[Any]) -> Any:
    """The op on what its operands hang on; None where an index or a condition hangs on the inputs."""
    if call.get("dtype") is not None:
        return None
    for node in call.node.all_input_nodes:
        data = call.data(node)
        if not (data.is_floating_point() or data.is_complex()) and _any(depends[node]):
            return None

    def read(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        data = call.data(item)
        if data.is_complex():  # the real part and the imaginary one
            return torch.complex(depends[item].double(), depends[item].double()).to(data.dtype)
        return depends[item].to(data.dtype) if data.is_floating_point() else data

    moved = call.run(read)
    if isinstance(moved, list | tuple):
        return [item != 0 for item in moved]
    return moved != 0


def _elementwise(call: MaskedOp, depends: Depends, results: list[Any]) -> Tensor | None:
    shape = results[0].shape
    if has(call.name, Trait.BATCH_NORM):
        return _batch_norm(call, depends)
    if "index" in call.arguments or not all(
        _fits(depends[n].shape, shape) for n in call.node.all_input_nodes
    ):
        return None  # entries go to other places
    found = torch.zeros(shape, dtype=torch.bool, device=results[0].device)
    for node in call.node.all_input_nodes:
        found |= depends[node]
    if has(call.name, Trait.SCALES):  # zero times anything is zero
        for node in call.node.all_input_nodes:
            found = found & nonzero(call, depends, node)
    return found


def _fits(own: torch.Size, shape: torch.Size) -> bool:
    """Whether a value is broadcast to a shape, as operands of an op that works entry by entry are."""
    return len(own) <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(shape), strict=False)
    )


def _batch_norm(call: MaskedOp, depends: Depends) -> Tensor | None:
    """A channel that is scaled by zero is a constant."""
    x, weight = call["input"], call.get("weight")
    if any(_any(depends[node]) for node in call.node.all_input_nodes if node is not x):
        return None
    held: Tensor = depends[x]
    others = [d for d in range(held.dim()) if d != 1]
    if call.get("training") is True:
        held = some(held, others).expand(held.shape)
    if weight is not None:
        held = held & (call.data(weight) != 0).reshape(1, -1, *(1,) * (held.dim() - 2))
    return held


def _reduced(call: MaskedOp, depends: Depends, results: list[Any]) -> Tensor | None:
    """All that is mixed hangs on what any of it hangs on."""
    mixed = mixed_dims(call.node)
    fed = [node for node in call.node.all_input_nodes if _any(depends[node])]
    if len(fed) != 1 or set(mixed) != set(fed) or not isinstance(results[0], Tensor):
        return None
    held, shape = some(depends[fed[0]], mixed[fed[0]]), results[0].shape
    if held.dim() != len(shape):
        held = held.squeeze(tuple(mixed[fed[0]]))
    return held.expand(shape) if held.dim() == len(shape) and _fits(held.shape, shape) else None


def _contracted(call: MaskedOp, depends: Depends, results: list[Any]) -> Tensor | None:
    products = bound(call.node)
    if products is None:
        return None
    operands = [call[operand.name] for operand in products.operands]
    numbers = all(call.data(node).is_floating_point() for node in operands)
    if not numbers or any(_any(depends[call[added.name]]) for added in products.added if added.name):
        return None
    if len(products.steps) > 1:
        return _attended(call, depends, products, results[0])
    found = torch.zeros(results[0].shape, dtype=torch.bool, device=results[0].device)
    for node in operands:
        if _any(depends[node]):
            found |= _product(call, depends, node, operands) != 0
    return found


def _product(call: MaskedOp, depends: Depends, held: fx.Node, operands: list[fx.Node]) -> Tensor:
    """How many products of an entry of `held` that hangs on the inputs, and others that are not zero, each result sums."""

    def read(item: Any) -> Any:
        if not isinstance(item, fx.Node):
            return item
        if item is held:
            return depends[item].double()
        return (
            nonzero(call, depends, item).double() if item in operands else torch.zeros_like(call.data(item))
        )

    counted = call.run(read)
    found: Tensor = counted[0] if isinstance(counted, list | tuple) else counted
    return found


def _attended(call: MaskedOp, depends: Depends, products: Product, result: Tensor) -> Tensor | None:
    """Of products of products (attention), what comes last weighs: where it is zero throughout, so is the result."""
    last = products.steps[-1].operands[-1]
    value = call[last.name]
    gone = [i for i, dim in enumerate(last.dims) if products.out.letters.isdisjoint(dim.letters)]
    held = some(nonzero(call, depends, value), gone)
    if held.dim() != result.dim():
        return None
    unlike = [d for d in range(result.dim()) if held.shape[d] not in (1, result.shape[d])]
    return some(held, unlike).expand(result.shape)


def added_to(node: fx.Node) -> list[Any]:
    """What a product adds to its result: its bias."""
    products, given = bound(node), arguments(node)
    return [given[operand.name] for operand in products.added if operand.name] if products else []


def outputs_of(node: fx.Node, value: fx.Node) -> list[int]:
    """Dims of a product's result along which it has other weights.

    Args:
        value: the data that is multiplied with them.
    """
    products, given = bound(node), arguments(node)
    assert products is not None
    weights = [o.letters for o in products.operands if given[o.name] is not value]
    return products.out.with_any(frozenset().union(*weights))
