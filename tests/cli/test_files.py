"""The commands on ONNX files: what they print, what they write, and one clear error each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from surgeon.cli.main import app
from surgeon.onnx.export import export

_run = CliRunner().invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    export(
        nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3)),
        folder / "a.onnx",
        torch.randn(2, 3, 9, 9),
    )
    np.save(folder / "rows.npy", np.random.default_rng(0).standard_normal((10, 3, 9, 9), dtype=np.float32))
    np.savez(folder / "rows.npz", input=np.load(folder / "rows.npy"))
    (folder / "text.npy").write_text("nothing")
    np.savez(folder / "uneven.npz", a=np.ones(3), b=np.ones(4))
    return folder


@pytest.mark.parametrize("data", ["rows.npy", "rows.npz"])
def test_quantize(folder: Path, tmp_path: Path, data: str) -> None:
    args = [
        "quantize",
        str(folder / "a.onnx"),
        str(tmp_path / "small.onnx"),
        "--data",
        str(folder / data),
        "--batch",
        "4",
    ]
    result = _run(app, [*args, "--ranges", "percentile"])
    assert result.exit_code == 0, result.output
    assert (
        "to leave the worst layer as it is: ignore=['node_conv2d" in result.output
        and (tmp_path / "small.onnx").is_file()
    )


def test_doctor(folder: Path) -> None:
    result = _run(
        app,
        ["doctor", str(folder / "a.onnx"), "--data", str(folder / "rows.npy"), "--batch", "2", "--runs", "2"],
    )
    assert result.exit_code == 0 and "ms a run" in result.output
    before = _run(app, ["doctor", str(folder / "a.onnx"), "--before", str(folder / "a.onnx"), "--runs", "2"])
    assert before.exit_code == 0 and "ms before)" in before.output


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    model, out, rows = str(folder / "a.onnx"), str(tmp_path / "small.onnx"), str(folder / "rows.npy")
    for match, args in (
        ("not an ONNX file", ["quantize", str(folder / "rows.npy"), out, "--data", rows]),
        ("unknown method", ["quantize", model, out, "--data", rows, "--method", "int2"]),
        ("cannot read the data", ["quantize", model, out, "--data", str(folder / "text.npy")]),
        ("cannot read the data", ["quantize", model, out, "--data", str(folder / "none.npy")]),
        ("different numbers of rows", ["quantize", model, out, "--data", str(folder / "uneven.npz")]),
        ("there is no such file", ["doctor", str(folder / "none.onnx")]),
        ("threads is 0", ["doctor", model, "--threads", "0"]),
    ):
        result = _run(app, args)
        assert result.exit_code == 1 and match in result.output and "Traceback" not in result.output, (
            result.output
        )
    assert list(tmp_path.iterdir()) == []
