"""What ONNX Runtime does to a file does not reach the caller: it runs in a child first, and masks, scales and
transposed convolutions that int8 spoils stay as they are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from surgeon.errors import FileError, QuantizeError, SurgeonError
from surgeon.onnx import child_process
from surgeon.onnx.child_process import guilty_node, run_in_child
from surgeon.onnx.export import export
from surgeon.onnx.quantization.float_nodes import check_scales, float_nodes
from surgeon.onnx.quantization.quantize import quantize


def _file(path: Path, nodes: list[Any], constants: dict[str, Any], shape: list[int]) -> Path:
    """x of a shape -> the last node's output."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_a_child_gives_what_a_session_gives(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"], "neg")], {}, [3])
    x = np.arange(3, dtype=np.float32)
    found = run_in_child(path, [{"x": x}, {"x": x + 1}])
    assert [run[0].tolist() for run in found] == [(-x).tolist(), (-x - 1).tolist()]
    with pytest.raises(FileError, match="cannot run the file"):
        run_in_child(path, [{"x": np.zeros(4, np.float32)}])


def test_a_file_that_ends_its_process_is_an_error_that_names_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for a runtime's fault: the child ends itself where a file holds a Tan."""
    script = tmp_path / "child_process_main.py"
    script.write_text(
        "import os, signal, sys, onnx, onnxruntime\n"
        "onnxruntime.InferenceSession(sys.argv[1])\n"  # what lacks an input does not come that far
        "if any(n.op_type == 'Tan' for n in onnx.load(sys.argv[1]).graph.node): os.kill(os.getpid(), signal.SIGSEGV)\n"
        f"exec(compile(open({str(child_process._SCRIPT)!r}).read(), 'child', 'exec'))\n"
    )
    monkeypatch.setattr(child_process, "_SCRIPT", script)
    ops = ["Neg", "Abs", "Tan", "Cos", "Sin"]
    nodes = [
        helper.make_node(op, [f"v{n}" if n else "x"], [f"v{n + 1}"], f"the_{op}") for n, op in enumerate(ops)
    ]
    fed = {"x": np.zeros(3, np.float32)}
    for order in (nodes, nodes[::-1]):  # files of some tools are in no order
        path = _file(tmp_path / "a.onnx", order, {}, [3])
        assert guilty_node(path, fed) == "the_Tan (Tan)"
    with pytest.raises(FileError, match=r"the_Tan \(Tan\)(.|\n)*SIGSEGV"):
        run_in_child(path, [fed])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_half_precision_recurrent_layers_leave_python_alive(kind: str, tmp_path: Path) -> None:
    """In one and in two directions, exported in fp16 and quantised to it: a file that agrees, or an error."""
    code = f"""
import torch, surgeon
import surgeon.onnx.child_process
surgeon.onnx.child_process.guilty_node = lambda path, fed: "some (node)"  # it is sought elsewhere, and takes a while
from torch import nn
class Net(nn.Module):
    def __init__(self, both):
        super().__init__()
        self.cell = nn.{kind}(4, 6, batch_first=True, bidirectional=both)
        self.head = nn.Linear(12 if both else 6, 3)
    def forward(self, x):
        return self.head(self.cell(x)[0])
x = torch.randn(2, 5, 4)
for both in (False, True):
    net = Net(both).eval()
    surgeon.export(net, "a.onnx", x)
    for attempt in (lambda: surgeon.export(net, "b.onnx", x, precision="fp16"),
                    lambda: surgeon.quantize("a.onnx", "c.onnx", [x], method="fp16")):
        try:
            attempt()
        except surgeon.errors.SurgeonError as error:
            assert "node" in error.where, error
        print("alive")
"""
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.count("alive") == 4, run.stderr[-2000:]


class Steps(nn.Module):
    """A recurrent layer over the first dim, and outputs of every step."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.cell = nn.Linear(4, 5), kind(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.head(x))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_a_file_of_halves_stay_float(kind: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    export(Steps(kind).eval(), tmp_path / "a.onnx", x)
    assert quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", [x], method="fp16").error < 1e-2
    proto = onnx.load(str(tmp_path / "b.onnx"))
    (cell,) = [node for node in proto.graph.node if node.op_type == kind.__name__]
    casts = {name for node in proto.graph.node if node.op_type == "Cast" for name in node.output}
    assert {name for name in cell.input if name} <= casts
    assert {t.data_type for t in proto.graph.initializer} >= {onnx.TensorProto.FLOAT16}


class Masked(nn.Module):
    """Attention in which a later position is not seen, by a number that is added or put in its place."""

    def __init__(self, value: float, put: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value, self.put = value, put
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores, later = q @ k.transpose(1, 2) / 4, torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if self.put:
            scores = scores.masked_fill(later, self.value)
        else:
            scores = scores + torch.zeros(x.shape[1], x.shape[1]).masked_fill(later, self.value)
        return self.out(scores.softmax(-1) @ v)


@pytest.mark.parametrize(
    ("value", "put", "ranges"),
    [
        (-torch.inf, False, "minmax"),
        (-torch.inf, True, "percentile"),
        (-1e4, False, "minmax"),
        (-1e9, True, "minmax"),
    ],
)
def test_masks_of_attention_stay_float(value: float, put: bool, ranges: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 6, 16, generator=generator) for _ in range(4)]
    export(Masked(value, put), tmp_path / "a.onnx", batches[0])
    report = quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", batches, ranges=ranges)
    proto = onnx.load(str(tmp_path / "b.onnx"))
    scales = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith("_scale")]
    assert scales and max(float(scale.max()) for scale in scales) < 1
    assert report.error < 0.05
    assert (
        sum(node.op_type == "QuantizeLinear" for node in proto.graph.node) >= 3
    )  # the products are quantised


def test_what_stays_float_lies_between_a_product_and_a_softmax(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"], "product"),
        helper.make_node("Relu", ["x"], ["positive"], "relu"),
        helper.make_node("Add", ["scores", "bias"], ["shifted"], "bias"),
        helper.make_node("Softmax", ["shifted"], ["p"], "softmax"),
        helper.make_node("Mul", ["p", "positive"], ["y"], "after"),
    ]
    path = _file(
        tmp_path / "a.onnx", nodes, {"w": np.eye(3, dtype=np.float32), "bias": np.ones(3, np.float32)}, [3, 3]
    )
    assert set(float_nodes(onnx.load(str(path)))) == {"bias", "softmax"}


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["v"], "maker"),
        helper.make_node("QuantizeLinear", ["v", "scale"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], "d"),
        helper.make_node("Abs", ["d"], ["y"], "reader"),
    ]
    for scale in (np.inf, np.nan, 0.0):
        path = _file(tmp_path / "a.onnx", nodes, {"scale": np.float32(scale)}, [3])
        with pytest.raises(QuantizeError, match=r"maker(.|\n)*ignore=\['maker', 'reader'\]"):
            check_scales(onnx.load(str(path)))
    check_scales(onnx.load(str(_file(tmp_path / "a.onnx", nodes, {"scale": np.float32(0.5)}, [3]))))


def test_grouped_transposed_convolutions_take_one_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 4, 2, groups=4), nn.Conv2d(12, 3, 1)
    )
    export(model, tmp_path / "a.onnx", torch.randn(2, 3, 6, 6))
    report = quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", [torch.randn(2, 3, 6, 6) for _ in range(3)])
    assert report.error < 0.05
    weights = {
        t.name: tuple(t.dims)
        for t in onnx.load(str(tmp_path / "b.onnx")).graph.initializer
        if "weight_scale" in t.name
    }
    assert sorted(map(len, weights.values())) == [0, 1, 1]  # the others keep one for each channel


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, times: int = 1) -> dict[str, Tensor]:
        return {"y": self.layer(x) * times, "seen": x}


@pytest.mark.parametrize(
    ("inputs", "fixed"), [((torch.randn(2, 8),), ()), ((torch.randn(2, 8), 3), ("times = 3",))]
)
def test_inputs_keep_their_names_and_numbers_are_said(
    inputs: Any, fixed: tuple[str, ...], tmp_path: Path
) -> None:
    report = export(Returns(), tmp_path / "a.onnx", inputs)
    (given,) = onnx.load(str(tmp_path / "a.onnx")).graph.input
    assert given.name == "x" and given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert report.fixed == fixed and ("times = 3" in str(report)) == bool(fixed)


def test_declared_shapes_are_those_of_the_outputs(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    export(Steps(), tmp_path / "a.onnx", torch.randn(2, 5, 4), dynamic_shapes=({0: "rows", 1: "steps"},))
    (output,) = onnx.load(str(tmp_path / "a.onnx")).graph.output
    sizes = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    assert sizes == [0, 0, 6]  # 0: may vary


def test_what_the_runtime_refuses_stays_in_the_family(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.onnx", [helper.make_node("NoSuchOp", ["x"], ["y"], "odd")], {}, [3])
    with pytest.raises(SurgeonError, match="NoSuchOp"):
        run_in_child(path, [{"x": np.zeros(3, np.float32)}])
