"""The limit of an export follows the rounding of the model: steep networks export, wrong files do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from steep import Steep
from torch import Tensor, nn

import surgeon
from surgeon.errors import ExportError
from surgeon.onnx.validate import compare


def test_a_steep_network_is_exported_and_the_report_says_what_was_allowed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Steep(7).eval(), torch.randn(8, 6)
    report = surgeon.export(model, tmp_path / "model.onnx", x)
    assert 1e-4 < report.error <= report.limit <= 0.05, report
    assert f"at most {report.limit:.0e} is allowed" in str(report)
    with torch.no_grad():
        model.layers[0].weight[0] *= 1.01
    with pytest.raises(ExportError, match="times what rounding changes in the model"):
        compare(model, tmp_path / "model.onnx", [((x,), {})])


def test_the_usual_limit_stays_where_rounding_is_usual(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Steep(1).eval(), torch.randn(8, 6)
    assert surgeon.export(model, tmp_path / "model.onnx", x).limit == 1e-4
    with torch.no_grad():
        model.last.weight *= 1.001
    with pytest.raises(ExportError, match="at most 1e-04 is allowed"):
        compare(model, tmp_path / "model.onnx", [((x,), {})])


class NearlyNothing(nn.Module):
    """Numbers that the exporter's optimizer takes for 0 or 1: they keep divisions from 0 / 0, or scale by a little."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        size = y.norm(dim=-1, keepdim=True)
        squared = (y**2).sum(-1, keepdim=True)
        return (
            y / (size + 1e-8), y / (1e-12 + size), y / torch.sqrt(squared + 1e-8), y / (size - -1e-9), (y * 1.000004) / 0.999996,
            (y + 0) * 1 - 0,
        )  # fmt: skip


@pytest.mark.parametrize("opset", [None, 20])
def test_small_numbers_stay(opset: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NearlyNothing().eval()
    surgeon.export(model, tmp_path / "m.onnx", torch.randn(2, 4), opset=opset)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["x"]
    for x in (torch.zeros(3, 4), torch.randn(3, 4), 1e-9 * torch.randn(3, 4)):
        found = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            wanted = model(x)
        for left, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(left, right.numpy(), rtol=2e-6, atol=1e-30)
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("Identity") <= 1 and "Cast" not in ops, "what does nothing goes"
