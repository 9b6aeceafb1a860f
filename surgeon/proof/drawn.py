"""drawn(graph) -> the inputs of a recorded run as a proof takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.graph.graph import Graph
from surgeon.graph.nests import map_tensors
from surgeon.ops.masked_op import wide, widened
from surgeon.ops.table import op_name


def drawn(graph: Graph) -> Any:
    """(args, kwargs) of a recorded run in float64; those of floating point drawn at random (the same in each call), unless
    the model's control flow reads values.
    """
    random = not reads_values(graph)
    generator = torch.Generator().manual_seed(0)

    def fresh(tensor: Tensor) -> Tensor:
        numbers = tensor.is_floating_point() or tensor.is_complex()
        if not random or not numbers or tensor.layout is not torch.strided:
            return wide(tensor.detach())
        return torch.randn(tensor.shape, generator=generator, dtype=widened(tensor.dtype)).to(tensor.device)

    return map_tensors((graph.args, graph.kwargs), fresh)


def reads_values(graph: Graph) -> bool:
    if graph.reads:
        return True
    for node in graph.fx.nodes:
        tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
        if torch.Tag.data_dependent_output in tags:
            return True
        if torch.Tag.dynamic_output_shape in tags and op_name(node) != "index":  # most are by whole numbers
            return True
    return False


def reads_numbers(graph: Graph) -> bool:
    """Whether the code took numbers out of tensors, as `item()` and NumPy do; they may stand among those of later ops."""
    tags = (getattr(node.target, "tags", ()) for node in graph.fx.nodes if node.op == "call_function")
    return bool(graph.reads) or any(torch.Tag.data_dependent_output in found for found in tags)
