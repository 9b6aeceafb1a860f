"""What is loaded when: `import surgeon` is nearly free, help does without torch, and heavy packages come when used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import surgeon

HEAVY = (
    "torch numpy sympy networkx onnx onnxruntime onnxscript rich safetensors typer matplotlib joblib".split()
)
ROOT = Path(surgeon.__file__).parent.parent


def loaded(code: str) -> set[str]:
    """Which heavy packages are loaded after the code, in a fresh process."""
    report = f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_the_import_loads_nothing_heavy() -> None:
    assert loaded("import surgeon; surgeon.__version__; dir(surgeon)") == set()


def test_the_import_takes_next_to_no_time() -> None:
    code = "import torch, time; t = time.process_time(); import surgeon; print(time.process_time() - t)"
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(times) <= 0.25, times


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["shrink", "--help"]])
def test_help_does_without_torch(arguments: list[str]) -> None:
    code = f"""
import contextlib, io, sys
from surgeon.cli.main import main
sys.argv = ["surgeon", *{arguments}]
with contextlib.suppress(SystemExit):
    main()"""
    assert loaded(code) <= {"typer", "rich"}


def test_a_cut_loads_no_exporter() -> None:
    code = """
import torch, surgeon
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
surgeon.shrink(model, 0.5, example_inputs=torch.randn(2, 4), round_to=1)"""
    assert loaded(code) <= {"torch", "numpy", "networkx", "safetensors"}


def test_only_public_names_show() -> None:
    assert set(dir(surgeon)) == {*surgeon.__all__, "__version__"}
    assert surgeon.criteria.BUILT_IN  # modules are found when they are asked for
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = surgeon.nothing
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "surgeon.__version__"}
