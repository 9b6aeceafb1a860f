"""What criterion "kfac" says that the outputs lose, next to what they lose: one group cut at a time,
recovered without training.

    python -m benchmarks.studies.foretold [--data DIR] [--model resnet20] [--ratio 0.25]

A loss is the squared distance of a sample's logits from the base's, in the mean over 2,000 training images
that are not among those to calibrate by. "factors alone" is what the Kronecker factors say without the losses
that are measured on the samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import surgeon
from benchmarks.accuracy.recover_tasks import TASKS, Task, pixels_of
from benchmarks.lib.cifar_data import MODELS, data_parser, normalised
from benchmarks.lib.results import markdown, write_result
from surgeon import criteria

JUDGED = 2_000
Batches = list[Tensor]


class FactorsAlone(criteria.KFAC):
    """Without what was measured of each unit."""

    def _left(self, reading: Any, units: int) -> Any:
        found = super()._left(reading, units)
        found.share = np.ones(units)
        return found


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(x) for x in images.split(250)])


def prepared(
    criterion: str | criteria.Criterion, surgery: surgeon.Surgery, batches: Batches
) -> criteria.Criterion:
    parts = {part: getattr(surgery, part) for part in ("model", "graph", "propagation", "solution", "groups")}
    return criteria.prepare(criterion, **parts, data=batches)


def foretold(
    kfac: criteria.Criterion, surgery: surgeon.Surgery, group: Any, count: int, samples: int
) -> float:
    """The sum of the least scores, per sample."""
    return float(np.sort(criteria.scores(kfac, group, surgery.graph.tensors).ravel())[:count].sum()) / samples


def recovered(
    task: Task, kfac: criteria.Criterion, surgery: surgeon.Surgery, layer: str, ratio: float, batches: Batches
) -> nn.Module:
    """Recovered without a share of this layer's filters."""
    others = [
        name for name, module in task.base.named_modules() if isinstance(module, nn.Conv2d) and name != layer
    ]
    plan = surgery.plan(ratio, criterion=kfac, round_to=1, ignore=others)
    return surgeon.recover(plan.apply(task.base), plan, task.base, batches).model


def main() -> None:
    parser = data_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="resnet20")
    parser.add_argument("--ratio", type=float, default=0.25, help="of a group's units that leave")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task: Task = TASKS[asked.model](asked.model, asked.data)
    batches = [x for x, _ in task.calibration(0)]
    pixels, _ = pixels_of(asked.data / "cifar10-train.npz")
    order = torch.randperm(
        len(pixels), generator=torch.Generator().manual_seed(0)
    )  # the first of these calibrate
    images = normalised(pixels[order[-JUDGED:]])
    surgery = surgeon.inspect(task.base, batches[0][:1])
    ours, factors = (prepared(which, surgery, batches) for which in ("kfac", FactorsAlone()))
    base, samples = logits(task.base, images), sum(map(len, batches))
    rows = []
    for group in surgery.groups:
        layer, count = group.name.removesuffix(".weight[0]"), int(group.units * asked.ratio)
        if not task.inner(layer):  # of the residual stream, which more than one layer reads
            continue
        small = recovered(task, ours, surgery, layer, asked.ratio, batches)
        lost = float((logits(small, images) - base).square().sum(1).mean())
        said = [foretold(which, surgery, group, count, samples) for which in (ours, factors)]
        rows.append(
            [
                layer,
                str(group.units),
                f"{lost:.2f}",
                *(f"{x:.2f}" for value in said for x in (value, value / lost)),
            ]
        )
        print(rows[-1], flush=True)
    header = [
        "filters of",
        "units",
        "lost",
        "foretold",
        "foretold / lost",
        "factors alone",
        "factors alone / lost",
    ]
    length = float(base.square().sum(1).mean())
    notes = [
        f"{asked.model}: {asked.ratio:.0%} of one layer's filters leave, chosen by 'kfac' on 2,000 images; then surgeon.recover.",
        (
            f"lost: squared distance of the logits from the base's, per sample, on {JUDGED:,} other training images, where the "
            f"base's mean squared length is {length:.0f}."
        ),
        "foretold: the sum of the scores. factors alone: what they would be without the losses that are measured unit by unit.",
    ]
    write_result("foretold", "What a cut will cost, foretold and measured", markdown(header, rows), notes)


if __name__ == "__main__":
    main()
