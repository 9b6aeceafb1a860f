"""Sweeps: each row is measured in a process of its own that is stopped at a limit, and kept, so that a
stopped sweep goes on.

A script that sweeps runs itself with `--one ...` for each row, and there calls `answer`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.lib.results import ROOT, Rows, first_line, keep, kept

SECONDS = "SURGEON_ROW_SECONDS"  # of CPU time, for the process of a row
Row = dict[str, Any]  # with several cuts: {"cuts": {name of a cut: the proof's error, or why there is none}}


def answer(measured: Callable[..., Row], *arguments: Any) -> None:
    """Measure a row and print it; where that raises, the row says so."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if SECONDS in os.environ:
        limit = int(os.environ[SECONDS])
        resource.setrlimit(resource.RLIMIT_CPU, (limit, 2 * limit))
    try:
        row = measured(*arguments)
    except Exception as error:  # noqa: BLE001  # the row says what went wrong
        row = {"failed": first_line(error), "detail": str(error)[:1000]}
    print(json.dumps(row))


def options(description: str | None, models: str = "only names that match") -> argparse.ArgumentParser:
    """What every sweep over models can be asked for.

    Args:
        models: which ones the filter picks, for the help.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--filter", default="", metavar="PATTERN", help=f"{models}, as timm/*vit*; writes no table"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    return parser


def asked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The same, with a time limit, of a script whose rows have one name."""
    parser.add_argument("--limit", type=int, default=600, help="seconds of CPU time for a model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(module: str, arguments: Sequence[str], limit: int) -> Row:
    """What `python -m module --one arguments` answers.

    Args:
        limit: seconds of CPU time, so that a busy machine changes no row; four times as many by the clock.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment[SECONDS] = str(limit)
    environment["TORCHDYNAMO_DISABLE"] = "1"  # torchvision compiles its Python form of roi_align
    command = [sys.executable, "-m", module, "--one", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=4 * limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {4 * limit} s"}
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"no answer within {limit} s of CPU time"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        found: Row = json.loads(lines[-1])
        return found
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"failed": said[-1][:300]}


def sweep(
    name: str,
    module: str,
    wanted: Mapping[str, Sequence[str]],
    *,
    limit: int,
    jobs: int = 2,
    again: Callable[[Row], bool] = lambda row: False,
    show: Callable[[str, Row], object] = print,
) -> Rows:
    """All rows that are wanted, by key; of the sweep's name in the cache those that it holds.

    Args:
        module: what is run for each row, as `python -m` takes it.
        wanted: key of a row -> what follows `--one`.
        limit: seconds of CPU time for a row.
        jobs: processes at a time.
        again: whether a row that is kept is measured again.
        show: called with each new row.
    """
    rows = kept(name)
    todo = [key for key in wanted if key not in rows or again(rows[key])]
    with ThreadPoolExecutor(jobs) as pool:
        for key, row in zip(
            todo, pool.map(lambda key: in_process(module, wanted[key], limit), todo), strict=True
        ):
            rows = keep(name, {key: row})
            show(key, row)
    return {key: rows[key] for key in wanted}


def sweep_of_models(
    name: str,
    module: str,
    description: str | None,
    measured: Callable[[str], Row],
    names: Callable[[], Iterable[str]],
    cells: Callable[[str, Row], list[str]],
) -> Rows | None:
    """Rows of all models, as the command line asks; None where no table is to be written.

    Args:
        measured: one row, in a process of its own.
        names: of the models.
        cells: a row as text, printed as soon as it is there.
    """
    chosen = asked(options(description))
    if chosen.one:
        answer(measured, chosen.one)
        return None
    rows = sweep(
        name, module, {key: [key] for key in names() if fnmatch.fnmatch(key, chosen.filter or "*")},
        limit=chosen.limit, jobs=chosen.jobs, again=lambda row: chosen.fresh or (chosen.retry and failed(row)),
        show=lambda key, row: print(" | ".join(cells(key, row)), flush=True),
    )  # fmt: skip
    return None if chosen.filter else rows


def failed(row: Row) -> bool:
    """Whether a row, or one of its cuts, has no number."""
    return "failed" in row or any(isinstance(cut, str) for cut in row.get("cuts", {}).values())


def cuts_of(rows: Iterable[Row], labels: Sequence[str]) -> list[float | str]:
    """Every cut of these rows: the proof's error, or why there is none."""
    return [cut for row in rows for cut in row.get("cuts", dict.fromkeys(labels, "failed")).values()]


def cut_cells(name: str, row: Row, labels: Sequence[str]) -> list[str]:
    """A model's name and its cuts as text."""
    if "failed" in row:
        return [name, f"no: {row['failed']}", *[""] * (len(labels) - 1)]
    return [name, *(f"no: {cut}" if isinstance(cut, str) else f"{cut:.0e}" for cut in row["cuts"].values())]
