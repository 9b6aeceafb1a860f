"""README's two commands: `.ci/run` calls them in README's order, and what the first writes does not disturb the
second.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    return re.findall(r"^make \w+", text, re.M)


def test_ci_calls_what_readme_says() -> None:
    called = commands((ROOT / ".ci" / "run").read_text())
    assert called == ["make demo", "make test"]
    assert [line for line in commands((ROOT / "README.md").read_text()) if line in called] == called


def test_lint_is_the_same_beside_what_the_commands_write(tmp_path: Path) -> None:
    """A folder named like a module that a script imports is no package of this project."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name in ("demo", "build", "dist"):
        (tmp_path / name).mkdir()
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
