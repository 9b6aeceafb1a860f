"""MACs of a recorded run. One MAC is one multiply-accumulate of a product."""

from __future__ import annotations

from torch import fx

from surgeon.graph.graph import Graph
from surgeon.ops.product import Product
from surgeon.ops.table import product


def macs_of(graph: Graph) -> int:
    """MACs of one run of the model as it was recorded."""
    return sum(found.macs for found in products_of(graph).values())


def products_of(graph: Graph) -> dict[fx.Node, Product]:
    """The products that have MACs, in order."""
    every = ((node, product(node)) for node in graph.fx.nodes)
    return {
        node: found for node, found in every if found is not None and any(step.summed for step in found.steps)
    }
