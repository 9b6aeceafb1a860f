"""benchmarks/: folders import one way, every script starts, and every command that a text names exists."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
MAY_IMPORT: dict[str, set[str]] = {
    "lib": set(),
    "coverage": {"lib"},
    "cuts": {"lib"},
    "speed": {"lib"},
    "accuracy": {"lib"},
    "studies": {"lib", "accuracy"},
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(path): path for path in sorted(FOLDER.rglob("*.py")) if path.name != "__init__.py"}
SCRIPTS = [name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()]


def imported(path: Path) -> Iterator[str]:
    """Modules of this folder that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else str(node.module)


def test_folders_import_one_way() -> None:
    for name, path in FILES.items():
        folder = name.split(".")[1]
        used = {module.split(".")[1] for module in imported(path)}
        assert used <= MAY_IMPORT[folder] | {folder}, name
    graphlib.TopologicalSorter({name: list(imported(path)) for name, path in FILES.items()}).prepare()


def test_no_shelf_is_too_long() -> None:
    for folder in (FOLDER / name for name in MAY_IMPORT):
        assert len(list(folder.glob("*.py"))) <= 14, folder


def test_what_scripts_use_of_surgeon_is_there() -> None:
    """Inside functions, too."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgeon":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    ), f"{name}: {node.module} has no {alias.name}"


def test_every_script_starts() -> None:
    """`--help` of each, in one process: what they import and their options are there."""
    code = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    print(name, "usage:" in said.getvalue())
"""
    run = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split("\n")[:-1] == [f"{name} True" for name in SCRIPTS], run.stderr[-2000:]


def test_commands_that_are_named_exist() -> None:
    texts = [*FILES.values(), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *FOLDER.glob("results/*.md")]
    for text in texts:
        said = text.read_text()
        for name in re.findall(r"python -m (benchmarks(?:\.[a-z_]+)+)", said):
            assert name in SCRIPTS, f"{text.name} names {name}"
        for path in re.findall(r"\bbenchmarks/[\w/]+\.py\b", said):
            assert (ROOT / path).is_file(), f"{text.name} names {path}"
    for name in SCRIPTS:
        assert f"python -m {name}" in FILES[name].read_text(), name


def test_results_say_how_they_were_made() -> None:
    for result in FOLDER.glob("results/*.md"):
        assert re.search(r"^`python -m benchmarks\.", result.read_text(), re.M), result.name


def test_faults_to_plant_stand_in_the_source() -> None:
    from benchmarks.coverage.mutation import FAULTS, tests_of

    for fault in FAULTS:
        source = (ROOT / "surgeon" / fault.file).read_text()
        assert source.count(fault.old) == 1, f"{fault.file}: {fault.old!r}"
        assert all((ROOT / path).exists() for path in tests_of(fault))
