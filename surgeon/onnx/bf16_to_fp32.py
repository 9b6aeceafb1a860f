"""A bfloat16 ONNX file as one in float32 that computes with the same rounded weights: the CPU has no kernels
for bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.onnx.file import read


def widen(path: Path, wide: Path) -> None:
    """Write the file at `path` to `wide` with float32 for bfloat16: in weights, constants, casts, inputs and
    outputs.
    """
    import onnx

    proto = read(path, weights=True)
    narrow, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for graph in _graphs(proto.graph):
        for tensor in [*graph.initializer, *_constants(graph)]:
            if tensor.data_type == narrow:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = float32
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == narrow:
                    attribute.i = float32
    onnx.save(proto, str(wide), save_as_external_data=proto.ByteSize() > 1 << 30)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _constants(graph: Any) -> list[Any]:
    return [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
