"""Which transformers can be recovered: cut at ratio 0.25, then refit, batch norms re-estimated, and
distilled, on noise.

    pip install torchvision transformers
    python -m benchmarks.coverage.recover_zoo [--filter PATTERN] [--limit SECONDS] [--retry | --fresh]

Weights are random and inputs are noise: the table says what recovery reaches, recover.md what it wins on real
data. A row works if the proof of the cut passes, recovery ends, and the model's distance from the original on
noise that recovery never saw is not more than that of the model as cut. Each model runs in a process of its
own with a time limit. Rows are kept in benchmarks/.cache/recover_zoo.json, so that a run that was stopped
goes on.
"""

from __future__ import annotations

import fnmatch
import statistics
import time
from typing import Any

from benchmarks.lib.isolated import answer, asked, options, sweep
from benchmarks.lib.results import markdown, write_result
from benchmarks.lib.zoo.models import names

RATIO, EPOCHS = 0.25, 2
BATCHES, IMAGES = 40, 8  # a transformer's two samples hold few rows, an image many
SHOWN = "transformers/*"
HEADER = ["model", "as cut", "refit, batch norm", "distilled", "layers refit", "works", "seconds"]


def drawn(name: str, inputs: Any) -> Any:
    """Other inputs like these; those that say where things are (masks, positions, timesteps) stay."""
    import torch

    library, _, model = name.partition("/")
    if library == "transformers":
        from benchmarks.lib.zoo.transformers import ROWS

        return ROWS[model].inputs()

    def other(item: Any) -> Any:
        if isinstance(item, torch.Tensor) and item.is_floating_point():
            return torch.rand_like(item) if item.min() >= 0 else torch.randn_like(item)
        return [other(each) for each in item] if isinstance(item, list) else item

    if isinstance(inputs, dict):
        return {key: other(value) for key, value in inputs.items()}
    return tuple(map(other, inputs)) if isinstance(inputs, tuple) else other(inputs)


def measured(name: str) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    import surgeon
    from benchmarks.lib.zoo.models import build
    from surgeon.recovery.recover import Recovery

    model, inputs = build(name)
    count = BATCHES if name.startswith("transformers/") else IMAGES
    batches, unseen = ([drawn(name, inputs) for _ in range(number)] for number in (count, count // 2))
    surgery = surgeon.inspect(model, example_inputs=inputs)
    plan = surgery.plan(RATIO, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, inputs)
    start = time.perf_counter()
    found: Recovery = surgeon.recover(
        small, plan, model, batches, steps=("refit", "batch_norm", "distill"), held_out=0.25, epochs=EPOCHS
    )
    seconds = time.perf_counter() - start
    with torch.no_grad():
        apart = [_distance(model, other, unseen) for other in (small, found.model)]
    fits, solved = found.steps[0].fits, found.steps[1]
    return {
        "before": found.before, "refit": min(solved.before, solved.after), "after": found.after,
        "layers": [sum(fit.taken for fit in fits), len(fits)], "unseen": apart, "seconds": seconds,
    }  # fmt: skip


def _distance(model: Any, other: Any, batches: list[Any]) -> float:
    """Of all outputs together, relative."""
    import copy

    from benchmarks.coverage.zoo import tensors

    wrong = whole = 0.0
    for batch in batches:
        wanted, given = (tensors(_answer(each.eval(), copy.deepcopy(batch))) for each in (model, other))
        for want, got in zip(wanted, given, strict=True):
            if want.is_floating_point():
                known = want.isfinite()  # masked logits may be -inf
                wrong += float((want - got)[known].double().square().sum())
                whole += float(want[known].double().square().sum())
    return (wrong / whole) ** 0.5


def _answer(model: Any, batch: Any) -> Any:
    return (
        model(**batch)
        if isinstance(batch, dict)
        else model(*batch)
        if isinstance(batch, tuple)
        else model(batch)
    )


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """The row as text."""
    if "failed" in row:
        return [name, "", "", "", "", f"no: {row['failed']}", ""]
    before, after = row["unseen"]
    works = "yes" if after <= before else f"no: {before:.1%} -> {after:.1%} on unseen noise"
    layers = f"{row['layers'][0]} of {row['layers'][1]}"
    return [
        name,
        *(f"{row[key]:.1%}" for key in ("before", "refit", "after")),
        layers,
        works,
        f"{row['seconds']:.0f}",
    ]


def main() -> None:
    """Run all models and write the table."""
    chosen = asked(options(__doc__, "other models of the zoo"))
    if chosen.one:
        answer(measured, chosen.one)
        return
    wanted = {name: [name] for name in names() if fnmatch.fnmatch(name, chosen.filter or SHOWN)}
    found = sweep(
        "recover_zoo", f"{__package__}.recover_zoo", wanted, limit=chosen.limit, jobs=chosen.jobs,
        again=lambda row: chosen.fresh or (chosen.retry and "failed" in row),
        show=lambda name, row: print(" | ".join(cells(name, row)), flush=True),
    )  # fmt: skip
    rows = [cells(name, row) for name, row in found.items()]
    fine = [row for row in found.values() if "failed" not in row]
    if chosen.filter or not fine:
        return
    gains = [1 - row["unseen"][1] / row["unseen"][0] for row in fine]
    fitted, layers = (sum(row["layers"][i] for row in fine) for i in (0, 1))
    nearer = sum(gain > 0 for gain in gains)
    notes = [
        (
            f"{len(fine)} of {len(rows)} are cut and recovered: {nearer} are nearer to the original on noise that recovery "
            f"did not see, {sum(gain == 0 for gain in gains)} as far, {sum(gain < 0 for gain in gains)} farther."
        ),
        (
            f"{sum(row[5] == 'yes' for row in rows)} of {len(rows)} work; of the distance on noise that recovery did not see a "
            f"median of {statistics.median(gains):.0%} is taken away. {fitted:,} of {layers:,} layers were refit."
        ),
        (
            f"Channel ratio {RATIO} by l1 magnitude, without hints; random weights; {BATCHES} batches of two samples of random "
            f"words or noise, a quarter held out, and half as many that recovery did not see; distilled for {EPOCHS} epochs."
        ),
        "Distances of the outputs from the original's, relative, on the samples that were held out.",
        (
            "What random weights compute hangs on every channel alike, and noise says little of them: much less can be won "
            "back here than of trained networks (recover.md)."
        ),
    ]
    write_result("recover_zoo", "Recovery: transformers at ratio 0.25", markdown(HEADER, rows), notes)


if __name__ == "__main__":
    main()
