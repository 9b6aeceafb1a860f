"""kernels(shapes, choice): the products that a choice leaves, as a runtime sees them; and the time that one
takes alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph
from surgeon.ops.ids import DimIds
from surgeon.ops.letters import Step
from surgeon.ops.product import Product

_REPEATS = 12  # timed runs of a kernel, after two that are not timed
Choice = DimIds


class Shapes(Protocol):
    """The shapes of a model's values under a choice of what leaves.

    Attributes:
        graph: the model's recorded run.
        products: its convolutions, matrix products and attentions, in order, by letters.
    """

    graph: Graph

    @property
    def products(self) -> Mapping[fx.Node, Product]: ...

    def shape(self, node: fx.Node, choice: Choice) -> tuple[int, ...]: ...

    def product(self, node: fx.Node, choice: Choice) -> Product: ...


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One product as a runtime sees it.

    Attributes:
        kind: "conv", "conv_transpose" or "matmul".
        x, w: shapes of the data and the weight; for matmul [..., M, K] and [..., K, N].
        stride, padding, dilation: of convolutions.
        groups: of convolutions.
    """

    kind: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) channels."""
        if self.kind == "matmul":
            return self.w[-2], self.w[-1]
        out, into = self.w[:2] if self.kind == "conv" else self.w[1::-1]
        return (into * self.groups, out) if self.kind == "conv" else (into, out * self.groups)

    @property
    def key(self) -> str:
        """A text that stands for this kernel in the table of measured times."""
        return json.dumps(dataclasses.astuple(self))

    def at(self, share_in: float, share_out: float, block: int) -> Kernel:
        """The same kernel with fewer channels, in whole blocks where it has one."""
        into, out = self.widths
        new_in, new_out = _part(into, share_in, block), _part(out, share_out, block)
        if self.kind == "matmul":
            return dataclasses.replace(self, x=(*self.x[:-1], new_in), w=(*self.w[:-2], new_in, new_out))
        groups = self.groups if self.groups == 1 else max(1, round(self.groups * new_in / into))
        if self.groups > 1:  # what a group holds stays; there are fewer groups
            new_in, new_out = groups * (into // self.groups), groups * (out // self.groups)
        w = (new_out, new_in // groups) if self.kind == "conv" else (new_in, new_out // groups)
        return dataclasses.replace(
            self, x=(self.x[0], new_in, *self.x[2:]), w=(*w, *self.w[2:]), groups=groups
        )


def _part(width: int, share: float, block: int) -> int:
    return width if share == 1 else max(min(width, block), round(width * share / block) * block)


def kernels(shapes: Shapes, choice: Choice) -> list[list[Kernel]]:
    """The kernels of every product of the graph, in order: two for a fused attention."""
    return [_kernels(shapes, node, choice) for node in shapes.products]


def _kernels(shapes: Shapes, node: fx.Node, choice: Choice) -> list[Kernel]:
    products = shapes.product(node, choice)
    if not products.windows:
        return [Kernel("matmul", *_matrices(products, step)) for step in products.steps]
    given, (step,) = arguments(node), products.steps
    x, w = (shapes.shape(given[operand.name], choice) for operand in step.operands)
    stride, padding, dilation = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    kind, groups = "conv_transpose" if given["transposed"] else "conv", max(1, products.count(step.batch))
    return [Kernel(kind, x, w, stride, padding, dilation, groups)]


def _matrices(products: Product, step: Step) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes [..., M, K] and [..., K, N] of a product of matrices; of three operands, the first with what the others
    are together.

    Example: "n(hg)qd, nhkd -> n(hg)qk" with n=2, h=4, g=3, q=5, k=7, d=8 is [2, 12, 5, 8] times [2, 12, 8, 7].
    """
    left, *others = step.operands
    batch = [products.count(frozenset(left.dims[i].letters)) for i in left.with_any(step.batch)]
    numbered = frozenset(letter for i in left.with_any(step.batch) for letter in left.dims[i].letters)
    right = frozenset(letter for operand in others for letter in operand.letters)
    summed = left.letters & right - numbered
    rows, columns = (
        products.count(letters - summed - numbered) for letters in (left.letters, right & step.computed)
    )
    return (*batch, rows, products.count(summed)), (*batch, products.count(summed), columns)


def time_by_onnxruntime(todo: Sequence[Kernel], threads: int) -> list[float]:
    """Milliseconds of each kernel alone, by ONNX Runtime's own profile: reordering of what goes in and out is
    not counted.
    """
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, inputs, weights, outputs = [], [], [], []
    for number, kernel in enumerate(todo):
        data = generator.standard_normal(kernel.w, dtype=np.float32) * 0.1
        inputs.append(helper.make_tensor_value_info(f"x{number}", onnx.TensorProto.FLOAT, kernel.x))
        outputs.append(helper.make_tensor_value_info(f"k{number}", onnx.TensorProto.FLOAT, None))
        weights.append(numpy_helper.from_array(data, f"w{number}"))
        names = ([f"x{number}", f"w{number}"], [f"k{number}"])
        if kernel.kind == "matmul":
            nodes.append(helper.make_node("MatMul", *names, name=f"k{number}"))
            continue
        layout: dict[str, Any] = {
            "strides": kernel.stride,
            "pads": kernel.padding * 2,
            "dilations": kernel.dilation,
        }
        op = "Conv" if kernel.kind == "conv" else "ConvTranspose"
        nodes.append(helper.make_node(op, *names, name=f"k{number}", group=kernel.groups, **layout))
    model = helper.make_model(
        helper.make_graph(nodes, "kernels", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    fed = {
        f"x{number}": generator.standard_normal(kernel.x, dtype=np.float32)
        for number, kernel in enumerate(todo)
    }
    with tempfile.TemporaryDirectory() as folder:
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads, session_options.enable_profiling = threads, True
        session_options.profile_file_prefix = os.path.join(folder, "profile")
        session_options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
        )
        for _ in range(_REPEATS + 2):
            session.run(None, fed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[int, list[float]] = {number: [] for number in range(len(todo))}
    for event in events:
        label = event.get("name", "")
        if event.get("cat") == "Node" and label.startswith("k") and label.endswith("_kernel_time"):
            times[int(label[1:].split("_")[0])].append(event["dur"] / 1e3)
    return [float(np.median(times[number][2:])) for number in range(len(todo))]


def time_by_torch(
    todo: Sequence[Kernel], threads: int, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Milliseconds of each kernel alone in eager torch; on CUDA by events."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_torch_time(kernel, device, dtype) for kernel in todo]
    finally:
        torch.set_num_threads(before)


def _torch_time(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    x, w = (torch.randn(shape, device=device, dtype=dtype) for shape in (kernel.x, kernel.w))
    layout = (
        kernel.stride,
        kernel.padding,
        kernel.dilation,
        kernel.kind != "conv",
        [0] * len(kernel.stride),
        kernel.groups,
    )

    def run() -> Tensor:
        return x @ w if kernel.kind == "matmul" else torch.convolution(x, w, None, *layout)

    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 2):
            if device.type == "cuda":
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop))
            else:
                begun = time.perf_counter()
                run()
                times.append((time.perf_counter() - begun) * 1e3)
    return float(np.median(times[2:]))
