"""surgeon compact: weights with zeros -> a folder that surgeon.load reads, and that gives what the weights gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon.cli import main as cli

SOURCE = """
from torch import nn


def make():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
"""


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        found[0].weight[:5] = 0  # type: ignore[index]  # a layer
        found[2].weight[:, 8] = 0  # type: ignore[index]  # a layer
    (tmp_path / "net.py").write_text(SOURCE)
    save_file(found.state_dict(), tmp_path / "zeros.safetensors")
    return found


def test_the_folder_gives_what_the_weights_gave(model: nn.Module, tmp_path: Path) -> None:
    source, weights, out = tmp_path / "net.py", tmp_path / "zeros.safetensors", tmp_path / "out"
    done = run("compact", f"{source}:make", "--weights", weights, "--input", "1,6", "--out", out)
    assert done.exit_code == 0, done.output
    assert "0.weight[0]: 6 of 16 channels" in done.stdout and "written: model.safetensors" in done.stdout
    small = surgeon.load(out, lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-6)
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)


def test_nothing_is_written_where_nothing_is_zero(model: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.1, 1)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    asked = (f"{tmp_path / 'net.py'}:make", "--weights", tmp_path / "dense.safetensors", "--input", "1,6")
    done = run("compact", *asked, "--out", tmp_path / "out")
    assert done.exit_code != 0 and "nothing of this model is zero" in done.stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
