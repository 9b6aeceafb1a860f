"""The limit of an export follows the rounding of the model: steep networks export, wrong files do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from steep import Steep

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
