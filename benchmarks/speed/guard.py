"""Do the speed benchmarks still print what their committed tables say? Runs them anew and holds each ratio against the table.

    pip install torchvision torch-pruning==1.6.1
    python -m benchmarks.speed.guard [--only surgery_time]

Ratios are of two things that were measured in turns in one run, so that they hold on other machines, unlike times. One that
is more than 15 % worse than the committed one is printed as a failure, and the exit code is 1. The tables in
benchmarks/results are those of the new run; `git checkout` puts the committed ones back.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.lib.results import RESULTS, ROOT

WORST = 0.85  # of the committed ratio


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A benchmark and the columns of its table that hold ratios; columns on the left of the first number name a row."""

    command: tuple[str, ...]
    columns: tuple[str, ...]


GUARDED = {
    "surgery_time": Guarded(("benchmarks.speed.surgery_time",), ("torch-pruning / surgeon",)),
    "aligned": Guarded(
        ("benchmarks.speed.aligned", "--rounds", "20"), ("ONNX Runtime speed-up", "torch speed-up")
    ),
}


def ratios(text: str, columns: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """{(row, column): ratio} of the first table of a file of results.

    Raises:
        ValueError: the table has no such column.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _first_table(text)]
    header, body = rows[0], rows[2:]
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}")
    found = {}
    for row in body:
        for column in columns:
            number = re.match(r"\d+(\.\d+)?", row[header.index(column)])
            if number:
                found[_name(row), column] = float(number[0])
    return found


def _first_table(text: str) -> Iterator[str]:
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("|"):
            yield line
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def _name(row: list[str]) -> str:
    """What a row is of: its cells up to the first one with a decimal number."""
    own = []
    for cell in row:
        if re.fullmatch(r"\d+\.\d+.*", cell):
            break
        own.append(cell)
    return ", ".join(own)


def worse(
    before: dict[tuple[str, str], float], now: dict[tuple[str, str], float]
) -> list[tuple[tuple[str, str], float, float]]:
    """(row and column, committed, now) of ratios that dropped by too much, or are gone."""
    return [(key, was, now.get(key, 0.0)) for key, was in before.items() if now.get(key, 0.0) < WORST * was]


def main() -> None:
    """Run what is guarded, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GUARDED, default=list(GUARDED))
    failed = []
    for name in parser.parse_args().only:
        guarded, path = GUARDED[name], RESULTS / f"{name}.md"
        before = ratios(path.read_text(), guarded.columns)
        subprocess.run([sys.executable, "-m", *guarded.command], cwd=ROOT, check=True)
        now = ratios(path.read_text(), guarded.columns)
        failed += [(name, *found) for found in worse(before, now)]
        print(f"{name}: {len(before)} ratios held against the committed table", flush=True)
    for name, (row, column), was, is_now in failed:
        print(f"FAILED {name}: {row}: {column}: {was:.2f} committed, {is_now:.2f} now")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
