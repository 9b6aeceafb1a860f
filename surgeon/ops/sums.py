"""sums_scaled_by(node) -> the sums that a number at `node` scales: which operand is summed over which dims.

Code divides a sum by the number of its terms or by the root of it (1/sqrt(head_dim) in attention, 1/C in a
mean that is written by hand). Such a number follows the width that is summed over; any other number does not.
Nothing here knows of ids: the graph and the kinds of its ops are all that is read, so that the proof may use
it as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.ops.product import Product
from surgeon.ops.table import Family, Trait, bound, family, has, op_name, product

Sizes = Callable[[fx.Node, int], int]  # (value, dim) -> how many of its entries stay

POWERS = (-1, -0.5, -0.25, 0.25, 0.5, 1)
_COPIES = (1, 2, 3)  # attention with two or three products in one sum divides by sqrt(3 * head_dim)

_SCALED = (Trait.PROPORTIONAL,)
_TOWARDS_THE_SUM = (*_SCALED, Trait.ADDS)  # a bias that was added is scaled with the sum


@dataclasses.dataclass(frozen=True)
class Sum:
    """A value that an op sums over some dims.

    Attributes:
        value, dims: what is summed.
        weighted: whether its entries are multiplied with those of a parameter first.
    """

    value: fx.Node
    dims: tuple[int, ...]
    weighted: bool

    def change(self, kept: Sizes) -> tuple[int, int]:
        """The number of its terms before the cut and after it."""
        before = math.prod(spec(self.value).shape[dim] for dim in self.dims)
        return before, math.prod(kept(self.value, dim) for dim in self.dims)


def fed_by_inputs(graph: Graph) -> set[fx.Node]:
    """The nodes whose value hangs on the inputs."""
    fed = {node for _, node in graph.inputs}
    for node in graph.fx.nodes:
        if not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return fed


def summed_operands(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Of a product of two values: each with the dim that is summed over; [] of other ops."""
    return _summed(node, product(node))


def _summed(node: fx.Node, products: Product | None) -> list[tuple[fx.Node, int]]:
    if products is None or not products.steps[0].summed or len(products.steps[0].operands) != 2:
        return []
    step, given = products.steps[0], arguments(node)
    letters = step.summed - step.kernel
    found = [(operand, operand.with_any(letters)[-1]) for operand in step.operands]
    # in groups, the weight knows how many channels each sums over
    found.sort(key=lambda pair: not letters.issuperset(pair[0].dims[pair[1]].letters))
    return [(given[operand.name], dim) for operand, dim in found]


def sum_of(node: fx.Node, fed: set[fx.Node]) -> Sum | None:
    """The sum that an op computes; None if it computes none."""
    name = op_name(node) if node.op == "call_function" else ""
    operands = summed_operands(node)
    if operands:
        (value, dim), (other, _) = operands
        return Sum(value, (dim,), not fed.issuperset((value, other)))
    if not has(name, Trait.SUMS):
        return None
    distances = _summed(node, bound(node))
    if distances:
        return Sum(distances[0][0], (distances[0][1],), False)
    given = arguments(node)
    value, dims = given["self"], given.get("dim")
    rank = len(spec(value).shape)
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return Sum(value, tuple(dim % rank for dim in dims), False)


def sums_scaled_by(node: fx.Node, fed: set[fx.Node]) -> list[Sum]:
    """The nearest sums whose result is as many times larger as a number that `node` multiplies or divides by:
    those that its operand was made of, and those that its result goes into.
    """
    own = sum_of(node, fed)
    if own is not None:
        return [own]
    found: list[Sum] = []
    todo, seen = list(node.all_input_nodes), {node}
    while todo:
        here = todo.pop()
        made = None if here in seen else sum_of(here, fed)
        if made is not None:
            found.append(made)
        elif here not in seen and _passes(here, _TOWARDS_THE_SUM):
            todo += here.all_input_nodes
        seen.add(here)
    return [*found, *_sums_of(node, fed)]


def _sums_of(node: fx.Node, fed: set[fx.Node]) -> Iterator[Sum]:
    """The sums that a value goes into, times numbers and other values."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        here = todo.pop()
        for user in here.users:
            if user in seen:
                continue
            seen.add(user)
            into = sum_of(user, fed)
            if into is not None:
                yield into
            elif _passes(user, _SCALED):
                todo.append(user)


def _passes(node: fx.Node, traits: Iterable[Trait]) -> bool:
    if node.op != "call_function":
        return False
    name = op_name(node)
    return family(name) is Family.MOVEMENT or any(has(name, trait) for trait in traits)


def follows(node: fx.Node, before: float, after: float, fed: set[fx.Node], kept: Sizes) -> bool:
    """Whether a number that changed from `before` to `after` scales a sum whose number of terms changed by
    that share, or by its root.
    """
    ratio = after / before if before else math.inf
    for each in sums_scaled_by(node, fed):
        old, new = each.change(kept)
        if old != new and any(math.isclose(ratio, (new / old) ** power, rel_tol=1e-6) for power in POWERS):
            return True
    return False


def counts_terms(node: fx.Node, before: float, after: float, fed: set[fx.Node], kept: Sizes) -> bool:
    """Whether a number is, before and after, the number of terms of a sum of values (or its inverse, or a
    root of either), so that no other reading of it is likely.

    A sum that a parameter weights does not count: its terms are what they were for a reader of it.
    """
    for each in sums_scaled_by(node, fed):
        old, new = each.change(kept)
        if each.weighted or old == new:
            continue
        for power in POWERS:
            if any(
                math.isclose(before, (copies * old) ** power, rel_tol=1e-6)
                and math.isclose(after, (copies * new) ** power, rel_tol=1e-6)
                for copies in _COPIES
            ):
                return True
    return False


def scales(name: str, argument: str) -> bool:
    """Whether a number among an op's arguments multiplies or divides what it computes."""
    if has(name, Trait.SCALES):
        return argument in ("self", "other")
    attention = argument == "scale" and has(name, Trait.ATTENTION)
    return attention or (argument == "alpha" and family(name) is Family.CONTRACTION)
