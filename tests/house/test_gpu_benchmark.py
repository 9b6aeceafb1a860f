"""benchmarks/speed/gpu.py: its logic on the CPU device, with a tiny model; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.lib import results
from benchmarks.speed import gpu


def _tiny() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(32, 4)).eval(), torch.randn(1, 3, 9, 9)


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "built", lambda name: _tiny())
    gpu.main(
        [
            "--device",
            "cpu",
            "--models",
            "tiny",
            "--precisions",
            "fp32",
            "bf16",
            "--batches",
            "1",
            "2",
            "--rounds",
            "6",
        ]
    )
    (file,) = tmp_path.iterdir()
    lines = [line.split(" | ") for line in file.read_text().splitlines() if line.startswith("| tiny")]
    assert [line[1:4] for line in lines] == [[p, b, "torch"] for p in ("fp32", "bf16") for b in ("1", "2")]
    assert all(float(line[4]) > 0 and "[" in line[6] for line in lines)
    assert "Device: cpu" in file.read_text()


def test_pairs_are_fused_and_shrunk() -> None:
    model, x = _tiny()
    before, after = gpu.pair(model, x, 0.5)
    for module in (before, after):
        assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert sum(p.numel() for p in after.parameters()) < 0.5 * sum(p.numel() for p in before.parameters())


def test_a_backend_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.BACKENDS, "cpu", ("torch", "cudagraph"))
    model, x = _tiny()
    rows = gpu.timed((model, model), x, "cpu", "fp32", [1], 6)
    assert (
        rows[0][1] == "torch" and rows[1][1] == "cudagraph" and "CUDA graphs need a CUDA device" in rows[1][2]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main([])
