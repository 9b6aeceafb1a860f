"""Random networks, cut at random, many more than the tests draw: how many are cut and proved, and what happens to others.

    python -m benchmarks.coverage.fuzz [--networks 20000] [--each 200] [--retry]

Each run of `tests/end_to_end/test_fuzz.py` has a seed of its own; runs are kept in benchmarks/.cache/fuzz.json, so that a
sweep that was stopped goes on. A network for which the property does not hold stands in the output as the smallest one
that hypothesis found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

from benchmarks.lib.results import ROOT, keep, kept, markdown, write_result

PARTS = 4  # of the test
FIRST = 1_000_000  # seeds of the sweep, away from those of the tests
MEANING = {
    "cut": "cut and proved: error at most 1e-9, runs at other batch sizes, in training mode and at the other sizes",
    "whole": "proved, and nothing could leave at this ratio",
    "BudgetError": "refused: what was asked cannot be reached, with the reason",
    "MendError": "refused: a number in the code cannot be changed as the widths ask for, with the place",
}


def run(number: int, each: int) -> dict[str, Any]:
    """One run of the test: how often each outcome came, and what failed."""
    seed = FIRST + PARTS * number
    asked = {"SURGEON_FUZZ": str(each // PARTS), "SURGEON_FUZZ_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "tests/end_to_end/test_fuzz.py",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    outcomes: Counter[str] = Counter()
    for line in done.stdout.splitlines():
        _, found, counts = line.partition("outcomes ")
        if found:
            outcomes.update(json.loads(counts))
    return {"outcomes": outcomes, "failed": done.stdout[-20_000:] if done.returncode else ""}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=20_000)
    parser.add_argument("--each", type=int, default=200, help="networks of one run")
    parser.add_argument("--retry", action="store_true", help="run those that failed again")
    asked = parser.parse_args()
    known = kept("fuzz")
    known = keep("fuzz", {}, without=[key for key, row in known.items() if asked.retry and row["failed"]])
    for number in range(-(-asked.networks // asked.each)):
        key = f"{number:04} of {asked.each}"
        if key not in known:
            row = run(number, asked.each)
            known = keep("fuzz", {key: row})
            print(key, dict(row["outcomes"]), row["failed"][-3000:], flush=True)
    total = sum((Counter(row["outcomes"]) for row in known.values()), Counter[str]())
    table = [
        [name, f"{count:,}", f"{count / total.total():.1%}", MEANING.get(name, "")]
        for name, count in total.most_common()
    ]
    failed = [key for key, row in known.items() if row["failed"]]
    notes = [
        f"{total.total():,} networks of {len(known)} runs. "
        + (
            f"The property does not hold in runs {', '.join(failed)}."
            if failed
            else "The property holds for all."
        ),
        (
            "Networks are made of one to twelve of the blocks in tests/models; ratio 25 to 75 %, all scopes and alignments, one "
            "call or two."
        ),
    ]
    header = ["outcome", "networks", "share", "what it means"]
    write_result("fuzz", "Random networks, cut at random", markdown(header, table), notes)


if __name__ == "__main__":
    main()
