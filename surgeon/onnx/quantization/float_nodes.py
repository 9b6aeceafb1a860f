"""Which nodes of a file stay float when it is quantised to int8, and why.

A sum with a mask (-inf, -1e4) has a range of which int8 can tell 256 steps: none is left for the logits. So what
lies between the products of attention and its softmax stays float, and so does whatever reads a mask constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from surgeon.errors import QuantizeError
from surgeon.onnx.quantization.layer_errors import PRODUCTS

_FAR = 1e4  # stands for infinity where only ranges are counted
_MASKED = 1e3  # constants of this size are there to win over everything else
_BOUNDS = ("Clip", "Min", "Max", "Pow", "Div")  # their constants are no values of a mask
_SOFTMAX = ("Softmax", "LogSoftmax")


def float_nodes(proto: Any) -> dict[str, str]:
    """Name of a node -> why it stays float.

    Args:
        proto: with its weights.
    """
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output if name}
    stays: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _SOFTMAX:
            stays[node.name] = "a softmax"
            stays |= {before.name: "leads to a softmax" for before in _before(node, makers)}
    masks = set(_mask_constants(graph))
    for node in graph.node:
        if node.op_type not in (*PRODUCTS, *_BOUNDS) and masks & set(node.input):
            stays.setdefault(node.name, "reads a mask")
            masks.update(node.output if node.op_type not in _SOFTMAX else ())
    return stays


def _before(node: Any, makers: dict[str, Any]) -> Iterator[Any]:
    """The nodes that a softmax's input is made by, back to products."""
    todo, seen = list(node.input), set()
    while todo:
        name = todo.pop()
        maker = makers.get(name)
        if name in seen or maker is None or maker.op_type in PRODUCTS:
            continue
        seen.add(name)
        if maker.op_type in _ELEMENTWISE:
            yield maker
            todo += maker.input


_ELEMENTWISE = frozenset(
    "Add Sub Mul Div Where Neg Min Max Clip Cast Expand Reshape Transpose Squeeze Unsqueeze Slice Concat Gather "
    "Identity Pow Sqrt".split()
)


def _mask_constants(graph: Any) -> Iterator[str]:
    """Names of float constants that hold an infinity or a very large number, weights of products left out."""
    import onnx

    weights = {name for node in graph.node if node.op_type in PRODUCTS for name in node.input[1:]}
    constants = [(tensor.name, tensor) for tensor in graph.initializer]
    constants += [
        (n.output[0], a.t)
        for n in graph.node
        for a in n.attribute
        if n.op_type == "Constant" and a.name == "value"
    ]
    for name, tensor in constants:
        if name in weights or tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size and float(np.abs(values).max()) >= _MASKED:
            yield name


def per_tensor_weights(proto: Any) -> list[str]:
    """Weights that take one scale: of grouped transposed convolutions, whose dim of outputs holds one group's."""
    grouped = (
        node
        for node in proto.graph.node
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    )
    return sorted({node.input[1] for node in grouped})


def with_names(proto: Any) -> Any:
    """The file itself, with a name for each node that has none."""
    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return proto


def with_finite_constants(proto: Any) -> Any:
    """The file itself, with numbers that are far off in place of infinite constants."""
    import onnx

    for tensor in _constants(proto.graph):
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and np.isinf(values).any():
            finite = np.nan_to_num(values, nan=np.nan, posinf=_FAR, neginf=-_FAR)
            tensor.CopyFrom(onnx.numpy_helper.from_array(finite.astype(values.dtype), tensor.name))
    return proto


def _constants(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    yield from (a.t for n in graph.node for a in n.attribute if n.op_type == "Constant" and a.name == "value")


def check_scales(proto: Any) -> None:
    """Refuse scales that are infinite, NaN or no positive numbers.

    Raises:
        QuantizeError: one is; the nodes that read or make what it scales are named.
    """
    import onnx

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in tensors:
            continue
        scales = onnx.numpy_helper.to_array(tensors[node.input[1]])
        if np.isfinite(scales).all() and (scales > 0).all():
            continue
        names = _around(proto.graph, node)
        raise QuantizeError(
            f"the scale of {node.input[0]!r} is {scales.min() if scales.size else scales}",
            where=", ".join(names),
            why="its values are infinite, NaN or too large in the batches: int8 tells 256 steps of a finite range",
            fix=f"leave what makes or reads it as it is: ignore={names}",
        )


def _around(graph: Any, scale: Any) -> list[str]:
    """Names of the nodes that make what is scaled, or read it."""
    ends = {*scale.input, *scale.output}
    for _ in range(2):  # a pair of scale and inverse
        pair = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
        ends |= {name for n in pair if ends & {n.input[0], n.output[0]} for name in (n.input[0], n.output[0])}
    kept = (n for n in graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear"))
    return [n.name for n in kept if ends & {*n.input, *n.output}]
