"""Top-1 of a CIFAR-10 ResNet-56 right after the cut, by criterion, scope and MACs; next to torch-pruning at
the same MACs.

No fine-tuning and no new batch-norm statistics, so the criterion is all that differs. Criteria that look at
data get the first training images; top-1 is of a part of the test images. torch-pruning's ratio is searched
until the MACs fit the budget.

    pip install torch-pruning==1.6.1 matplotlib
    python -m benchmarks.accuracy.criteria [--data DIR] [--criteria l1 taylor] [--scopes global] [--budgets 0.7]
    [--rivals]
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import surgeon
from benchmarks.lib.cifar_data import data_parser, read_images, require, top1
from benchmarks.lib.cifar_resnet import resnet56
from benchmarks.lib.results import ROOT, first_line, markdown, write_result
from surgeon import criteria
from surgeon.errors import SurgeonError
from surgeon.selection.options import SCOPES

BUDGETS = (0.9, 0.75, 0.6)
WEIGHTS, TRAIN, TEST = "cifar10-resnet56-adapted.safetensors", "cifar10-train.npz", "cifar10-test.npz"
CALIBRATION, BATCH, TESTED = (
    512,
    64,
    (2000, 3500),
)  # the defaults of some criteria were chosen on the images before
RIVALS = {
    "magnitude": lambda tp: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": lambda tp: tp.importance.BNScaleImportance(),
    "taylor": lambda tp: tp.importance.GroupTaylorImportance(),
    "hessian": lambda tp: tp.importance.GroupHessianImportance(),
    "lamp": lambda tp: tp.importance.LAMPImportance(),
    "fpgm": lambda tp: tp.importance.FPGMImportance(),
}
Pairs = list[tuple[Tensor, Tensor]]
Row = tuple[str, str, list[float | str]]


def by_surgeon(
    model: nn.Module, name: str, scopes: list[str], budgets: list[float], data: Pairs, test: Any
) -> Iterator[Row]:
    """Top-1 at each budget, for each scope."""
    surgery = surgeon.inspect(model, data[0][0][:1])
    parts = {part: getattr(surgery, part) for part in ("model", "graph", "propagation", "solution", "groups")}
    scores = criteria.prepare(name, **parts, data=data, loss=F.cross_entropy)
    for scope in scopes:
        found: list[float | str] = []
        for budget in budgets:
            try:
                plan = surgery.plan(macs=budget, criterion=scores, scope=scope, round_to=1)
                found.append(top1(plan.apply(model), *test))
            except SurgeonError as error:
                found.append(first_line(error))
        yield "surgeon", f"{name}, {scope}", found


class Rival:
    """torch-pruning with one importance; gradients are computed once and handed to every copy that is
    pruned.
    """

    def __init__(self, model: nn.Module, data: Pairs) -> None:
        import torch_pruning

        self.tp: Any = torch_pruning
        self.model, self.image = model, data[0][0][:1]
        self.macs = self.tp.utils.count_ops_and_params(model, self.image)[0]
        self.gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        count = sum(len(y) for _, y in data)
        for x, y in data:
            losses = F.cross_entropy(model(x), y, reduction="none")
            for loss in losses:
                for (name, _), g in zip(
                    model.named_parameters(),
                    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True),
                    strict=True,
                ):
                    self.gradient[name] += g / count
                    self.square[name] += g.square() / count

    def rows(self, name: str, scopes: list[str], budgets: list[float], test: Any) -> Iterator[Row]:
        for scope in scopes:
            found: list[float | str] = []
            for budget in budgets:
                try:
                    found.append(top1(self.fitted(name, scope == "global", budget), *test))
                except Exception as error:  # noqa: BLE001  # whatever the rival raises is a cell of the table
                    found.append(first_line(error))
            yield "torch-pruning", f"{name}, {scope}", found

    def fitted(self, name: str, everywhere: bool, budget: float) -> nn.Module:
        """The largest model within the budget, by bisection of the ratio."""
        low, high = 0.0, 1.0
        best: nn.Module | None = None
        for _ in range(12):
            ratio = (low + high) / 2
            small = self.pruned(name, everywhere, ratio)
            if self.tp.utils.count_ops_and_params(small, self.image)[0] <= budget * self.macs:
                best, high = small, ratio
            else:
                low = ratio
        if best is None:
            raise ValueError("no ratio meets the budget")
        return best

    def pruned(self, name: str, everywhere: bool, ratio: float) -> nn.Module:
        small = copy.deepcopy(self.model)
        importance = RIVALS[name](self.tp)
        for key, p in small.named_parameters():
            p.grad = self.gradient[key].clone()
        if name == "hessian":  # it keeps the last gradient only: give it the mean square as one
            for key, p in small.named_parameters():
                p.grad = self.square[key].sqrt()
            importance.zero_grad()
            importance.accumulate_grad(small)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self.tp.pruner.BasePruner(
                small,
                self.image,
                importance,
                pruning_ratio=ratio,
                global_pruning=everywhere,
                ignored_layers=[small.linear],
            )
            pruner.step()
        return small.eval()


def cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1%}"


def draw(rows: list[Row], scopes: list[str], budgets: list[float], base: float, path: Path) -> None:
    """One panel for each scope: the best criteria in colour, torch-pruning's dashed, the rest in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(scopes), figsize=(5 * len(scopes), 4), sharey=True, squeeze=False)
    for panel, scope in zip(panels[0], scopes, strict=True):
        lines = [
            row for row in rows if row[1].endswith(f", {scope}") and all(isinstance(v, float) for v in row[2])
        ]
        ranked = sorted(lines, key=lambda row: -sum(v for v in row[2] if isinstance(v, float)))
        shown: list[Row] = []
        for tool in ("surgeon", "torch-pruning"):
            shown += [row for row in ranked if row[0] == tool][:4]
        shown += [row for row in ranked if row[1] == f"l1, {scope}" and row not in shown]
        for row in lines:
            style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
            if row in shown:
                place = shown.index(row)
                label = f"{row[0]} {row[1].split(',')[0]}"
                style = {
                    "color": f"C{place}",
                    "linestyle": "-" if row[0] == "surgeon" else "--",
                    "label": label,
                    "marker": ".",
                }
            panel.plot([1.0, *budgets], [base, *row[2]], **style)
        panel.set(title=scope, xlabel="MACs left", ylim=(0, 1), xlim=(1.02, min(budgets) - 0.02))
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("top-1, no fine-tuning")
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn to {path}")


def main() -> None:
    """Measure and write the table and the chart."""
    parser = data_parser(__doc__)
    known = [name for name in criteria.BUILT_IN if name != "first"]
    parser.add_argument("--criteria", nargs="*", default=known)
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS))
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    asked = parser.parse_args()
    require(asked.data, (WEIGHTS, TRAIN, TEST))
    torch.set_num_threads(1)
    model = resnet56().eval()
    model.load_state_dict(load_file(asked.data / WEIGHTS))
    x, y = read_images(asked.data / TRAIN, CALIBRATION)
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    images, labels = read_images(asked.data / TEST, TESTED[1])
    test = images[TESTED[0] :], labels[TESTED[0] :]
    base = top1(model, *test)
    rows: list[Row] = []
    for name in asked.criteria:
        for row in by_surgeon(model, name, asked.scopes, asked.budgets, data, test):
            rows.append(row)
            print(*row, flush=True)
    if asked.rivals:
        rival = Rival(model, data)
        scopes = [scope for scope in asked.scopes if scope in ("uniform", "global")]
        for name in asked.rivals:
            for row in rival.rows(name, scopes, asked.budgets, test):
                rows.append(row)
                print(*row, flush=True)
    if asked.dry:
        return
    table = markdown(
        ["tool", "criterion, scope", *(f"MACs {b:.0%}" for b in asked.budgets)],
        [[tool, name, *map(cell, found)] for tool, name, found in rows],
    )
    notes = [
        f"ResNet-56 on CIFAR-10 (lossy JPEG), {base:.1%} before the cut; top-1 of test images {TESTED[0]:,} to {TESTED[1]:,}.",
        f"Data for the criteria: the first {CALIBRATION} training images in batches of {BATCH}, cross-entropy as the loss.",
        "No fine-tuning, no new batch-norm statistics: what recovery starts from.",
        (
            "torch-pruning: BasePruner, the ratio found by bisection; Taylor gets the mean gradient over the images, Hessian the "
            "mean of their squared gradients. The classifier's outputs are ignored."
        ),
    ]
    write_result("criteria", "Criteria on a CIFAR-10 ResNet-56, before any recovery", table, notes)
    draw(rows, asked.scopes, asked.budgets, base, ROOT / "docs" / "criteria.svg")


if __name__ == "__main__":
    main()
