"""The examples run and say what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgeon import Plan

ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> str:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *options],
        # on a busy machine waiting threads crawl
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "quickstart.py",
            ["Conv2d(3, 32", "-> Conv2d(3, 16", "10,602 -> 3,002 params", "proof: max relative error"],
        ),
        ("transformer.py", ["before: 8 heads of 8", "ratio 0.5: 4 heads of 8", "proof: max relative error"]),
        (
            "own_criterion.py",
            ["widths: [32, 48, 4]", "7 stays: True", "9 leaves: True", "proof: max relative error"],
        ),
    ],
)
def test_example(name: str, words: list[str]) -> None:
    said = run(name)
    for word in words:
        assert word in said


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said = run("demo.py", "--quick", "--out", str(tmp_path / "demo"))
    assert "Result" in said
    files = {file.name for file in (tmp_path / "demo").iterdir()}
    assert files == {"original.onnx", "small.onnx", "small.safetensors", "plan.json", "report.md"}
    plan = Plan.load(tmp_path / "demo" / "plan.json")
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "proof: max relative error" in report
    assert f"{plan.params:,}" in report


def test_lottery() -> None:
    pytest.importorskip("sklearn")
    said = run("lottery.py", "--quick")
    rows = [line for line in said.splitlines() if "%" in line]
    assert len(rows) == 6
    assert len({line.split("│")[2].strip() for line in rows[1:]}) == 1  # the rivals have as many parameters


def test_recipe(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said = run("recipe.py", "--quick", "--out", str(tmp_path / "out"))
    assert "step 2: " in said and "the budget is met" in said
    for word in ("sparsity", "compression ratio", "speed-up", "points"):
        assert word in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"original.onnx", "small.onnx", "small"}
    plans = [Plan.load(tmp_path / "out" / "small" / name) for name in ("plan.json", "plan-2.json")]
    assert plans[1].macs <= 0.25 * plans[0].macs_before
    assert f"{plans[1].macs:,}" in said
