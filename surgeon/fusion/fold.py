"""Fold: one op that a layer can take in, as it was found; Foldable: the recorded model in which folds are
looked for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

from torch import fx, nn

from surgeon.fusion.channels import Constants
from surgeon.fusion.owners import Owners, added_bias
from surgeon.graph.graph import Graph
from surgeon.ops.table import Trait, has, op_name, product


@dataclasses.dataclass(frozen=True)
class Fold:
    """One fold that is exact and can be made.

    Attributes:
        kind: what is folded, such as "conv-bn".
        layer: path of the layer that takes it in.
        gone: what leaves: the path of a module, or the op and the path of the module that runs it.
        changes: the ops that it changes, and the path of the module whose code it may change; two folds of
            one round share none.
        removes: how many ops of which family leave the graph (see `family_of`).
        make: makes it in the model that was recorded.
    """

    kind: str
    layer: str
    gone: str
    changes: frozenset[fx.Node | str] = dataclasses.field(repr=False, compare=False)
    removes: Counter[str] = dataclasses.field(repr=False, compare=False)
    make: Callable[[], None] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Foldable:
    """A model that may be changed, its recorded run, who owns what in it, and what in it is constant."""

    model: nn.Module
    graph: Graph
    owners: Owners
    constants: Constants

    @staticmethod
    def of(model: nn.Module, graph: Graph) -> Foldable:
        """A model with its recorded graph, the owners of its tensors and what is constant in it."""
        return Foldable(model, graph, Owners(model, graph), Constants(graph))


def family_of(node: fx.Node) -> str | None:
    """The family of an op that folds count: "norm", "product", "scale", "shift"; None for all others."""
    if node.op != "call_function":
        return None
    name, products = op_name(node), product(node)
    if has(name, Trait.BATCH_NORM):
        return "norm"
    if products is not None and len(products.steps) == 1:
        return "product"
    return "scale" if has(name, Trait.SCALES) else "shift" if has(name, Trait.ADDS) else None


def counted(graph: Graph) -> Counter[str]:
    """Ops of each family that read data; a bias that is added by hand is part of its product."""
    found: Counter[str] = Counter()
    constants = Constants(graph)
    families = {node: family_of(node) for node in graph.fx.nodes}
    biases = {added_bias(node) for node, family in families.items() if family == "product"}
    for node, family in families.items():
        if family is not None and node not in constants and node not in biases:
            found[family] += 1
    return found


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` is."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
