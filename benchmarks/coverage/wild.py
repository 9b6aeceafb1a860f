"""Kinds of models that are in no zoo here: speech, reading, pose, restoration, points, series, graphs, recommenders, state
spaces and others, small and in own code after the papers.

    python -m benchmarks.coverage.wild [--filter PATTERN] [--limit SECONDS] [--retry | --fresh]

Each model is cut at two ratios, to half of its MACs, and over all groups at once. A cut works if the proof passes and the
exported file agrees with the small model; where the exporter cannot take the original either, the cell says so. Each
model runs in a process of its own with a time limit. Rows are kept in benchmarks/.cache/wild.json.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.isolated import cut_cells, cuts_of, sweep_of_models
from benchmarks.lib.results import first_line, markdown, write_result

KINDS = (
    "graphs", "mixers", "points", "reading", "recommenders", "restoration", "series", "speech", "state_space",
    "text_to_speech", "vision",
)  # fmt: skip
CUTS: dict[str, dict[str, Any]] = {
    "0.3": {"ratio": 0.3},
    "0.5": {"ratio": 0.5},
    "macs 0.5": {"macs": 0.5},
    "global 0.5": {"ratio": 0.5, "scope": "global"},
}
HEADER = ["model", *CUTS, "params left at 0.5", "export"]


def models() -> dict[str, Any]:
    """kind/name -> what makes a model and its inputs."""
    found = {}
    for kind in KINDS:
        module = importlib.import_module(f"benchmarks.coverage.wild_models.{kind}")
        found |= {f"{kind}/{name}": make for name, make in module.MODELS.items()}
    return found


def measured(name: str) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    import surgeon
    from surgeon.errors import SurgeonError

    torch.manual_seed(0)
    model, inputs = models()[name]()
    model.eval()
    row: dict[str, Any] = {"cuts": {}}
    for label, request in CUTS.items():
        try:
            surgery = surgeon.inspect(model, inputs)
            small, plan = surgery.cut(round_to=1, **request)
            row["cuts"][label] = float(surgeon.verify(model, small, plan, inputs).error)
            if label == "0.5":
                row["left"] = plan.params / plan.params_before
                row["export"] = _exported(model, small, inputs)
        except SurgeonError as error:
            row["cuts"][label] = f"{first_line(error)} ({error.where[:120]})"
        except Exception as error:  # noqa: BLE001  # the table says what went wrong
            row["cuts"][label] = f"not refused: {first_line(error)}"
    return row


def _exported(model: Any, small: Any, inputs: Any) -> str:
    """Whether the exported file agrees with the small model, at any batch size or at that of the inputs (graphs have
    none); else whether the exporter takes the original.
    """
    said = _export(small, inputs, True)
    if not said:
        return "yes"
    if not _export(small, inputs, False):
        return "yes, one size"
    return "not of the original either" if _export(model, inputs, False) else f"no: {said}"


def _export(model: Any, inputs: Any, dynamic: bool) -> str:
    """Why a model is not exported; "" if it is."""
    import surgeon

    with tempfile.TemporaryDirectory() as folder:
        try:
            surgeon.export(model, Path(folder) / "model.onnx", inputs, dynamic_batch=dynamic)
        except Exception as error:  # noqa: BLE001  # the table says what went wrong
            return first_line(error)
    return ""


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """The row as text."""
    left = f"{row['left']:.2f}" if "left" in row else ""
    return [*cut_cells(name, row, tuple(CUTS)), left, row.get("export", "")]


def main() -> None:
    """Cut all models and write the table."""
    found = sweep_of_models("wild", f"{__package__}.wild", __doc__, measured, models, cells)
    if found is None:
        return
    cuts = cuts_of(found.values(), tuple(CUTS))
    proved = [cut for cut in cuts if not isinstance(cut, str)]
    exported = [row.get("export", "") for row in found.values()]
    agree, tried = sum(cell.startswith("yes") for cell in exported), sum(map(bool, exported))
    notes = [
        (
            f"{len(proved)} of {len(cuts)} cuts of {len(found)} models are proved; largest proof error {max(proved):.1e}. Others "
            "are refused, with the reason in the cell."
        ),
        (
            f"The exported file agrees with the small model for {agree} of {tried} models that were exported; "
            f"{exported.count('not of the original either')} the exporter does not take as they were either."
        ),
        "Random weights, default scores, no hints, no alignment. A number is the proof's error (float64; at most 1e-9).",
    ]
    if tried < len(found):
        notes.append("An empty cell: not exported in this run.")
    table = markdown(HEADER, [cells(name, row) for name, row in found.items()])
    write_result("wild", "Models of kinds that no zoo here has", table, notes)


if __name__ == "__main__":
    main()
