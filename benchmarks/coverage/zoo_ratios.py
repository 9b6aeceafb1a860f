"""Which architectures can be cut at other ratios than the zoo's: every model at five ratios and kinds of
heads, with proof.

    pip install torchvision timm transformers
    python -m benchmarks.coverage.zoo_ratios [--filter PATTERN] [--limit SECONDS] [--retry | --fresh]

zoo.py cuts at 0.5, where widths stay even and one number in a model's code often stands for two widths that
are halved together. Here channels are drawn at random, and attention loses values of heads, whole heads, or
both. A cut works if the proof passes, and if the small model runs on another batch size, in training mode and
through a backward pass. Each model runs in a process of its own with a time limit. Rows are kept in
benchmarks/.cache/zoo_ratios.json, so that a run that was stopped goes on.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from benchmarks.coverage.zoo import alive
from benchmarks.lib.isolated import answer, asked, options, sweep
from benchmarks.lib.results import first_line, markdown, write_result
from benchmarks.lib.zoo.models import names

CUTS = ((0.25, "dims"), (0.25, "whole"), (0.4, "both"), (0.6, "whole"), (0.75, "dims"))
HEADER = ["model", *(f"{ratio}, {heads}" for ratio, heads in CUTS)]


def measured(name: str) -> dict[str, Any]:
    """One row, in this process: the proof's error for each cut, or why there is none."""
    import surgeon
    from benchmarks.lib.zoo.models import build

    model, inputs = build(name)
    surgery = surgeon.inspect(model, example_inputs=inputs)
    return {"cuts": [_cut(name, model, inputs, surgery, *cut) for cut in CUTS]}


def _cut(name: str, model: Any, inputs: Any, surgery: Any, ratio: float, heads: str) -> float | str:
    """The proof's error, or why there is none."""
    import surgeon

    try:
        plan = surgery.plan(ratio, round_to=1, heads=heads, criterion="random", seed=1)
        small = plan.apply(model)
        proof = surgeon.verify(model, small, plan, inputs)
        alive(small, inputs, name)
    except Exception as error:  # noqa: BLE001  # the table says what went wrong
        return first_line(error)
    return float(proof.error)


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """The row as text."""
    if "failed" in row:
        return [name, f"no: {row['failed']}", *[""] * (len(CUTS) - 1)]
    return [name, *(f"no: {cut}" if isinstance(cut, str) else f"{cut:.0e}" for cut in row["cuts"])]


def main() -> None:
    """Run all models and write the table."""
    chosen = asked(options(__doc__))
    if chosen.one:
        answer(measured, chosen.one)
        return
    wanted = {name: [name] for name in names() if fnmatch.fnmatch(name, chosen.filter or "*")}
    found = sweep(
        "zoo_ratios", f"{__package__}.zoo_ratios", wanted, limit=chosen.limit, jobs=chosen.jobs,
        again=lambda row: chosen.fresh or (chosen.retry and _failed(row)),
        show=lambda name, row: print(" | ".join(cells(name, row)), flush=True),
    )  # fmt: skip
    if chosen.filter:
        return
    notes = []
    for library in dict.fromkeys(name.partition("/")[0] for name in found):
        own = [row for name, row in found.items() if name.startswith(f"{library}/")]
        cuts = [cut for row in own for cut in row.get("cuts", ["failed"] * len(CUTS))]
        proved = [cut for cut in cuts if not isinstance(cut, str)]
        notes.append(
            f"{library}: {len(proved)} of {len(cuts)} cuts work; all of them in {sum(not _failed(row) for row in own)} of "
            f"{len(own)} models; largest proof error {max(proved, default=0.0):.1e}."
        )
    every = [cut for row in found.values() for cut in row.get("cuts", ["failed"] * len(CUTS))]
    notes.append(f"In all {sum(not isinstance(cut, str) for cut in every):,} of {len(every):,} cuts work.")
    notes.append(
        "Channel ratio, and what attention loses: values of heads (dims), whole heads, or both. Channels drawn at random, random "
        "weights, no hints, no alignment. A number is the proof's error (float64; at most 1e-9)."
    )
    table = markdown(HEADER, [cells(name, row) for name, row in found.items()])
    write_result("zoo_ratios", "The zoo at other ratios", table, notes)


def _failed(row: dict[str, Any]) -> bool:
    return "failed" in row or any(isinstance(cut, str) for cut in row["cuts"])


if __name__ == "__main__":
    main()
