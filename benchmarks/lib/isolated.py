"""Sweeps: each row is measured in a process of its own that is stopped at a limit, and kept, so that a
stopped sweep goes on.

A script that sweeps runs itself with `--one ...` for each row, and there calls `answer`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.lib.results import ROOT, Rows, first_line, keep, kept

Row = dict[str, Any]


def answer(measured: Callable[..., Row], *arguments: Any) -> None:
    """Measure a row and print it; where that raises, the row says so."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
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
    parser.add_argument("--limit", type=int, default=600, help="seconds for a model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(module: str, arguments: Sequence[str], limit: int) -> Row:
    """What `python -m module --one arguments` answers.

    Args:
        limit: seconds.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # torchvision compiles its Python form of roi_align
    command = [sys.executable, "-m", module, "--one", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {limit} s"}
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
        limit: seconds for a row.
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
