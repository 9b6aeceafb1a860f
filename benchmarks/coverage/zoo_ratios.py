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

from functools import partial
from typing import Any

from benchmarks.coverage.zoo import alive
from benchmarks.lib.isolated import cut_cells, cuts_of, failed, sweep_of_models
from benchmarks.lib.results import first_line, markdown, write_result
from benchmarks.lib.zoo.models import names

CUTS = ((0.25, "dims"), (0.25, "whole"), (0.4, "both"), (0.6, "whole"), (0.75, "dims"))
LABELS = [f"{ratio}, {heads}" for ratio, heads in CUTS]


def measured(name: str) -> dict[str, Any]:
    """One row, in this process: the proof's error for each cut, or why there is none."""
    import surgeon
    from benchmarks.lib.zoo.models import build

    model, inputs = build(name)
    surgery = surgeon.inspect(model, example_inputs=inputs)
    cuts = (_cut(name, model, inputs, surgery, *cut) for cut in CUTS)
    return {"cuts": dict(zip(LABELS, cuts, strict=True))}


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


def main() -> None:
    """Run all models and write the table."""
    cells = partial(cut_cells, labels=LABELS)
    found = sweep_of_models("zoo_ratios", f"{__package__}.zoo_ratios", __doc__, measured, names, cells)
    if found is None:
        return
    notes = []
    for library in dict.fromkeys(name.partition("/")[0] for name in found):
        own = [row for name, row in found.items() if name.startswith(f"{library}/")]
        cuts = cuts_of(own, LABELS)
        proved = [cut for cut in cuts if not isinstance(cut, str)]
        notes.append(
            f"{library}: {len(proved)} of {len(cuts)} cuts work; all of them in {sum(not failed(row) for row in own)} of "
            f"{len(own)} models; largest proof error {max(proved, default=0.0):.1e}."
        )
    every = cuts_of(found.values(), LABELS)
    notes.append(f"In all {sum(not isinstance(cut, str) for cut in every):,} of {len(every):,} cuts work.")
    notes.append(
        "Channel ratio, and what attention loses: values of heads (dims), whole heads, or both. Channels drawn at random, random "
        "weights, no hints, no alignment. A number is the proof's error (float64; at most 1e-9)."
    )
    table = markdown(["model", *LABELS], [cells(name, row) for name, row in found.items()])
    write_result("zoo_ratios", "The zoo at other ratios", table, notes)


if __name__ == "__main__":
    main()
