"""Masks made physical: models of the zoo pruned by torch.nn.utils.prune (filters, inputs) or by scales of zero, at 30 and 60 %.

    pip install --no-deps timm torchvision
    python -m benchmarks.cuts.compacted [--filter PATTERN] [--fresh | --retry] [--jobs 2]

A row works if, for each kind of masks, what may leave left, and the outputs are within 1e-9 of the masked model's in float64.
Kinds: "filters" prunes dim 0 of every convolution and linear layer but the last one, "inputs" dim 1 of all but the first one,
"scales" sets scales of batch norms to zero, half of them with a beta below or above zero.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.lib.isolated import Row, sweep_of_models
from benchmarks.lib.results import first_line, markdown, write_result

AMOUNTS = (0.3, 0.6)
KINDS = ("filters", "inputs", "scales")
LABELS = [f"{kind} {amount:.0%}" for kind in KINDS for amount in AMOUNTS]
HEADER = ("model", *LABELS)
VISION = ("resnet50", "mobilenet_v2", "vit_b_32", "densenet121")
EACH = 5  # one family of timm in so many is in the table; all are there for --filter
TINY = 3  # layers of fewer channels (of images, masks) are not pruned


def prune_model(model: Any, kind: str, amount: float) -> int:
    """Prune in place; how many tensors were."""
    import torch
    from torch import nn
    from torch.nn.utils import prune

    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    weights = [m for m in layers if isinstance(m._parameters.get("weight"), nn.Parameter)]
    shared = {id(m.weight) for m in weights if sum(m.weight is other.weight for other in weights) > 1}
    done = 0
    if kind == "scales":
        generator = torch.Generator().manual_seed(0)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                count = int(amount * norm.num_features)
                chosen = torch.randperm(norm.num_features, generator=generator)[:count]
                beta = torch.rand(count, generator=generator) - 0.7
                beta[: count // 2] = 0
                with torch.no_grad():
                    norm.weight[chosen], norm.bias[chosen] = 0.0, beta
                done += 1
        return done
    dim = KINDS.index(kind)
    for layer in weights[:-1] if kind == "filters" else weights[1:]:
        if layer.weight.shape[dim] > TINY and id(layer.weight) not in shared:
            prune.ln_structured(layer, "weight", amount, n=2, dim=dim)
            done += 1
    return done


def measured(name: str) -> Row:
    """One row, in this process."""
    import surgeon
    from benchmarks.lib.zoo.models import build

    row: Row = {"cuts": {}}
    for kind in KINDS:
        for amount in AMOUNTS:
            model, inputs = build(name)
            label = f"{kind} {amount:.0%}"
            if not prune_model(model, kind, amount):
                row["cuts"][label] = None
                continue
            try:
                found = surgeon.compact(model, inputs)
            except surgeon.errors.SurgeonError as error:
                row["cuts"][label] = {"failed": first_line(error)}
                continue
            row["cuts"][label] = {
                "error": found.error,
                "params": found.plan.params / found.plan.params_before,
                "removed": sum(gone for gone, _ in found.removed.values()),
                "folded": sum(fold.channels for fold in found.folded),
                "kept": sum(kept.channels for kept in found.kept),
            }
    return row


def cells(name: str, row: Row) -> list[str]:
    """The row as text."""
    if "failed" in row:
        return [name, *(f"no: {row['failed']}" for _ in LABELS)]
    return [name, *map(_cell, row["cuts"].values())]


def _cell(cut: dict[str, Any] | None) -> str:
    if cut is None:
        return "-"
    if "failed" in cut:
        return f"no: {cut['failed']}"
    return f"{cut['params']:.0%}; {cut['removed']:,} / {cut['folded']:,} / {cut['kept']:,}"


def main() -> None:
    """Compact all models and write the table."""
    from benchmarks.lib.zoo.vision import TIMM

    def names() -> list[str]:
        chosen = TIMM if "--filter" in sys.argv else TIMM[2::EACH]
        return [*(f"torchvision/{name}" for name in VISION), *(f"timm/{name}" for name in chosen)]

    rows = sweep_of_models("compacted", f"{__package__}.compacted", __doc__, measured, names, cells)
    if rows is None:
        return
    cuts = [cut for row in rows.values() for cut in row.get("cuts", {}).values() if cut is not None]
    good = [cut["error"] for cut in cuts if "error" in cut]
    notes = [
        f"{len(good)} of {len(cuts)} models with masks are within 1e-9 of the masked model; largest error {max(good):.1e}.",
        "Cells: parameters left; channels that left / whose constants biases took over / that are zero or constant and stay.",
        "-: the model has no such layers. Random weights, ready for all inputs of the zoo.",
    ]
    table = markdown(HEADER, [cells(name, row) for name, row in rows.items()])
    write_result("compacted", "Masks made physical", table, notes)


if __name__ == "__main__":
    main()
