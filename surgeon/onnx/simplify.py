"""simplify(program): fold constants and leave out what does nothing, by onnxscript's optimizer, and nothing else.

That optimizer takes numbers for equal that are near: `x + 1e-8` becomes `x`, and `x * 1.000004` too. The first one
keeps a division from 0 / 0, which shows only where an input is zero. So numbers that are near to 0 or 1 and are
neither are inputs of the graph while it runs, and constants again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.onnx import ONNXProgram

_NEAR_ZERO, _NEAR_ONE = 1e-8, 1e-5  # what the optimizer's patterns allow, absolute and relative
_SLACK = 1.01  # the number may be rounded
_NAME = "small_constant"
_SAME = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}  # the number with which an op does nothing


def simplify(program: ONNXProgram) -> None:
    """In place."""
    graph = program.model.graph
    hidden: dict[tuple[Any, ...], ir.Value] = {}
    constants: dict[str, np.ndarray[Any, Any]] = {}
    for node, place, number in _near_misses(graph):
        key = number.dtype.str, number.shape, number.tobytes()
        if key not in hidden:
            name = f"{_NAME}_{len(hidden) + 1}"
            kind = ir.TensorType(ir.DataType.from_numpy(number.dtype))
            hidden[key] = ir.Value(name=name, type=kind, shape=ir.Shape(number.shape))
            constants[name] = number
        node.replace_input_with(place, hidden[key])
    graph.inputs.extend(hidden.values())
    program.optimize()
    graph = program.model.graph
    for value in [value for value in graph.inputs if value.name in constants]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(constants[str(value.name)], name=value.name)
        graph.register_initializer(value)


def _near_misses(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, np.ndarray[Any, Any]]]:
    """(node, which input, number): an op that would do nothing with a number near to this one."""
    for node in [*graph.all_nodes()]:
        neutral = _SAME.get(node.op_type) if node.domain == "" else None
        if neutral is None:
            continue
        limit = _SLACK * (_NEAR_ZERO if neutral == 0 else _NEAR_ONE)
        for place, value in enumerate(node.inputs):
            number = None if value is None else _constant(value)
            if (
                number is not None
                and number.dtype.kind == "f"
                and 0 < abs(float(number.ravel()[0]) - neutral) <= limit
            ):
                yield node, place, number


def _constant(value: ir.Value) -> np.ndarray[Any, Any] | None:
    """The one number that a value always is, in its dtype."""
    node, tensor = value.producer(), value.const_value
    if tensor is None and node is not None and node.op_type in ("Cast", "CastLike", "Identity"):
        source = node.inputs[0]
        number = None if source is None else _constant(source)
        if number is None or node.op_type == "Identity":
            return number
        like = value if node.op_type == "Cast" else node.inputs[1]
        dtype = None if like is None else like.dtype
        return None if dtype is None else number.astype(dtype.numpy())
    if tensor is None:
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    found: np.ndarray[Any, Any] = tensor.numpy()
    return found
