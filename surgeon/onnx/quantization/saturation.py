"""products_saturate(): whether int8 products saturate on this CPU."""

from __future__ import annotations

import functools

import numpy as np

# x86 without VNNI adds pairs of int8 products in 16 bits (`vpmaddubsw`): 255 * 127 twice does not fit. Weights of 7 bits
# always do (ONNX Runtime's page on quantisation).
_LARGEST = 255, 127  # of unsigned and of signed 8-bit numbers


@functools.cache
def products_saturate() -> bool:
    """Whether int8 products saturate on this CPU: whether ONNX Runtime gets the sum of two of the largest of them wrong."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    left, right = _LARGEST
    weight = numpy_helper.from_array(np.full((2, 1), right, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 2), left, np.uint8)})
    return int(found.item()) != 2 * left * right
