"""profile(file, feeds) -> what ran each op of an ONNX file, and how long it took, from ONNX Runtime's own
profiler.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.files import silence
from surgeon.onnx.file import open_session

REORDERS = ("ReorderInput", "ReorderOutput")  # what ONNX Runtime puts around ops on its blocked (NCHWc) path


@dataclasses.dataclass(frozen=True)
class OpTime:
    """One op of the graph that really runs, after ONNX Runtime's fusions.

    Attributes:
        name, op: of the node that ran; fused nodes have names of their own.
        provider: the execution provider that ran it.
        ms: median time of a run.
        shapes: of its inputs, as run.
        written: bytes of its outputs.
        read: bytes of its activations and weights.
    """

    name: str
    op: str
    provider: str
    ms: float
    shapes: tuple[tuple[int, ...], ...]
    written: int
    read: int


def profile(
    path: Path,
    feeds: Mapping[str, Any],
    *,
    runs: int = 1,
    threads: int = 1,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
) -> list[OpTime]:
    """Every op in the order of the graph, after one run that is not counted.

    Raises:
        Exception: ONNX Runtime's own, which share no class.
    """
    with tempfile.TemporaryDirectory() as folder, silence():
        session = open_session(path, threads, providers, profile=str(Path(folder) / "profile"))
        for _ in range(runs + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    facts: dict[str, dict[str, Any]] = {}
    for event in events:
        label = str(event.get("name", ""))
        if event.get("cat") == "Node" and label.endswith("_kernel_time"):
            name = label.removesuffix("_kernel_time")
            times[name].append(float(event["dur"]) / 1e3)
            facts[name] = event.get("args", {})
    found = []
    for name, own in times.items():
        args = facts[name]
        kept = own[len(own) // (runs + 1) :] or own  # of the first run, kernels are still being prepared
        shapes = tuple(tuple(shape) for entry in args.get("input_type_shape", ()) for shape in entry.values())
        read = int(args.get("activation_size", 0) or 0) + int(args.get("parameter_size", 0) or 0)
        ms = float(np.median(kept)) * len(kept) / runs
        found.append(
            OpTime(
                name,
                args.get("op_name", ""),
                args.get("provider", ""),
                ms,
                shapes,
                int(args.get("output_size", 0) or 0),
                read,
            )
        )
    return found


def providers_of(ops: Sequence[OpTime]) -> dict[str, int]:
    """Execution provider -> number of ops, the most frequent first."""
    return dict(Counter(op.provider for op in ops).most_common())


def blocked(ops: Sequence[OpTime]) -> bool | None:
    """Whether convolutions ran on the blocked path; None if there are none."""
    if any(op.op in REORDERS for op in ops):
        return True
    return False if any(op.op in ("Conv", "FusedConv") for op in ops) else None
