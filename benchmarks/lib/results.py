"""write_result(name, title, markdown_table, notes) -> benchmarks/results/NAME.md, with what is needed to run
it again.

`kept` and `keep`: rows of a long run, in benchmarks/.cache; in benchmarks/results, if they hold wherever they
are measured.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS, CACHE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / ".cache"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the first column is text, the others are figures."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_result(name: str, title: str, markdown_table: str, notes: Sequence[str] = ()) -> Path:
    """Write the table, what to know about it and the conditions; a reader sees the old file or the new one,
    never a part.
    """
    text = "\n".join(
        [f"# {title}", "", markdown_table, "", *[f"- {note}" for note in notes], "", conditions(), ""]
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.md"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, prefix=f".{name}.", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    print(f"\n{text}\nwritten to {path}")
    return path


Rows = dict[str, dict[str, Any]]


def kept(name: str, folder: Path = CACHE) -> Rows:
    """What a folder holds of an earlier run, so that a run that was stopped goes on."""
    path = folder / f"{name}.json"
    found: Rows = json.loads(path.read_text()) if path.is_file() else {}
    return found


def keep(name: str, found: Rows, without: Iterable[str] = (), folder: Path = CACHE) -> Rows:
    """Add rows to what is kept, or take some away; what it then holds."""
    gone = set(without)
    CACHE.mkdir(exist_ok=True)
    path, new = folder / f"{name}.json", CACHE / f"{name}.new"
    with open(CACHE / f"{name}.lock", "w") as lock:  # runs may go side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {key: row for key, row in sorted({**kept(name, folder), **found}.items()) if key not in gone}
        new.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(new, path)
    return rows


def conditions() -> str:
    """The command, versions, CPU model and threads of this run."""
    command = shlex.join(["python", "-m", _started_as(), *sys.argv[1:]])
    packages = ", ".join(f"{package} {_version(package)}" for package in ("torch", "onnxruntime", "surgeon"))
    isa, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"`{command}`: {packages}, Python {platform.python_version()}; {_cpu()} ({isa}), torch threads: {threads}."


def _started_as() -> str:
    """The name of the module that `python -m` runs."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).stem if spec is None else spec.name


def first_line(error: BaseException) -> str:
    """An exception as a cell of a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(source tree)"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
