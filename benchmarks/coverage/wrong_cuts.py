"""Does the proof find every wrong cut? Cuts of the zoo's models that are wrong in one channel of one tensor.

    pip install torchvision timm transformers
    python -m benchmarks.coverage.wrong_cuts [--filter PATTERN] [--fresh] [--jobs 2]

Each model is cut in half at random and proved; then, in tensors drawn at random, one kept index is exchanged
for a removed one, and the small model is cut accordingly: it runs, and every tensor holds what its plan says.
Such a plan must fail the proof. An exchange of two channels with equal numbers in that tensor is no fault and
is not tried. Rows are kept in benchmarks/.cache/wrong_cuts.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import surgeon
from benchmarks.lib.isolated import answer, sweep
from benchmarks.lib.results import kept, markdown, write_result
from benchmarks.lib.zoo.models import build, names
from surgeon.cut.slice import shrink_module

LIMIT = 300  # seconds for a model
CUTS = 6  # of each model


def exchanges(model: nn.Module, plan: surgeon.Plan) -> Iterator[tuple[str, surgeon.Plan]]:
    """Plans that are wrong in one channel: (tensor[dim], plan)."""
    chance, made = random.Random(0), 0
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    slots = [(name, dim) for name, dims in plan.kept.items() for dim in dims]
    chance.shuffle(slots)
    for name, dim in slots:
        stays, tensor = plan.kept[name][dim], tensors.get(name)
        leaves = [] if tensor is None else sorted(set(range(tensor.shape[dim])) - set(stays))
        if tensor is None or not leaves:
            continue
        out, back = chance.choice(stays), chance.choice(leaves)
        if torch.equal(tensor.select(dim, out), tensor.select(dim, back)):
            continue
        wrong = {**plan.kept, name: {**plan.kept[name], dim: sorted({*stays, back} - {out})}}
        yield f"{name}[{dim}]", dataclasses.replace(plan, kept=wrong)
        made += 1
        if made == CUTS:
            return


def measured(name: str) -> dict[str, Any]:
    """One row."""
    model, inputs = build(name)
    surgery = surgeon.inspect(model, example_inputs=inputs)
    plan = surgery.plan(0.5, criterion="random", seed=0, round_to=1)
    proof = surgeon.verify(model, plan.apply(model), plan, graph=surgery.graph)
    row: dict[str, Any] = {
        "error": proof.error,
        "hidden": proof.hidden,
        "tried": 0,
        "found": 0,
        "slipped": [],
    }
    for place, bad in exchanges(model, plan):
        small = shrink_module(model, bad.kept, bad.edits)
        row["tried"] += 1
        try:
            slipped = surgeon.verify(model, small, bad, graph=surgery.graph)
        except surgeon.errors.ProofError:
            row["found"] += 1
        else:
            row["slipped"].append(f"{place} ({slipped.hidden} hidden)")
    return row


def write(rows: dict[str, dict[str, Any]]) -> None:
    done = {name: row for name, row in rows.items() if "failed" not in row}
    table = [
        [
            name, str(row["tried"]), str(row["found"]), ", ".join(row["slipped"]) or "-", str(row["hidden"]),
            f"{row['error']:.1e}",
        ]
        for name, row in done.items()
    ]  # fmt: skip
    tried, found = (sum(row[key] for row in done.values()) for key in ("tried", "found"))
    notes = [
        f"{tried} wrong cuts of {len(done)} models; the proof finds {found} of them.",
        (
            "Each is wrong in one channel of one tensor, which is exchanged for another with other numbers; the rest is as "
            "planned (channel ratio 0.5, channels drawn at random). Hidden: channels that were zero throughout, so that nothing "
            "shows whether they are the right ones."
        ),
        *(f"{name} was not measured: {row['failed']}" for name, row in rows.items() if "failed" in row),
    ]
    header = ["model", "wrong cuts", "found", "not found", "hidden channels", "error of the right cut"]
    write_result("wrong_cuts", "Wrong cuts that the proof finds", markdown(header, table), notes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--filter", default="*", metavar="PATTERN", help="only names that match, as timm/*vit*"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what the cache holds")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        answer(measured, asked.one)
        return
    wanted = {name: [name] for name in names() if fnmatch.fnmatch(name, asked.filter)}
    sweep(
        "wrong_cuts",
        f"{__package__}.wrong_cuts",
        wanted,
        limit=LIMIT,
        jobs=asked.jobs,
        again=lambda row: asked.fresh,
    )
    rows = kept("wrong_cuts")
    write({name: rows[name] for name in names() if name in rows})


if __name__ == "__main__":
    main()
