"""Asked and reached: MACs, params, size and latency budgets; and whether predicted MACs and params are those
of the small model.

    pip install torchvision timm
    python -m benchmarks.speed.budgets [--models resnet50 ...] [--latency 0.7 0.5] [--counts] [--fresh latency]

Rows are kept in benchmarks/.cache/budgets.json, so that a run that was stopped goes on. Without --counts:
five models at shares of 0.7, 0.5 and 0.3, and latencies on ONNX Runtime (one thread, fused, CPU time). With
it: all models of the torchvision table and 20 timm families, predicted against counted (torch's flop counter,
halved).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from benchmarks.lib.cifar_data import DATA, MODELS
from benchmarks.lib.results import first_line, keep, kept, markdown, write_result
from benchmarks.lib.zoo.models import NAMES, build, names

FIVE = ("resnet50", "mobilenet_v2", "vit_b_32", "efficientnet_b0", "resnet56")
SHARES = (0.7, 0.5, 0.3)
KINDS = ("macs", "params", "size")


def one(name: str) -> tuple[nn.Module, Tensor]:
    if name in MODELS:
        model = MODELS[name]().eval()
        weights = DATA / f"cifar10-{name}-adapted.safetensors"
        if weights.is_file():
            model.load_state_dict(load_file(weights))
        return model, torch.randn(1, 3, 32, 32)
    model, image = build(f"torchvision/{name}")
    return model, image[:1]


def counted(model: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """(MACs, params) without surgeon: half of what torch's flop counter says, attention by its products."""
    plain = torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    )  # the counter knows the fused one on GPUs only
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(inputs)
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def budget_rows(name: str, latencies: list[float], fresh: list[str]) -> list[list[str]]:
    """The rows of a model; those that the cache holds are not measured again, but for fresh kinds."""
    model, image = one(name)
    surgery = surgeon.inspect(model, image)
    rows = []

    def add(kind: str, share: float, round_to: int | str, measure: Callable[..., tuple[str, str]]) -> bool:
        """Whether the budget can be met."""
        row = [name, kind, f"{share:.0%}", str(round_to)]
        known = {} if kind in fresh else kept("budgets")
        if " ".join(row) not in known:
            try:
                found = measure(surgery, model, image, kind, share, round_to)
            except surgeon.errors.BudgetError as error:
                found = first_line(error), "refused"
            known = keep("budgets", {" ".join(row): {"cells": found}})
        rows.append([*row, *known[" ".join(row)]["cells"]])
        print(rows[-1], flush=True)
        return rows[-1][-1] != "refused"

    for kind in KINDS:
        for share in SHARES:
            for round_to in (1, "auto"):
                add(kind, share, round_to, reached)
    for share in latencies:
        if not add("latency", share, "auto", timed):
            add("latency", share, 1, timed)
    return rows


def reached(
    surgery: surgeon.Surgery, model: nn.Module, image: Tensor, kind: str, share: float, round_to: int | str
) -> tuple[str, str]:
    """What the small model has, and whether that was predicted."""
    plan = surgery.plan(round_to=round_to, **{kind: share})
    again = surgeon.inspect(plan.apply(model), image)
    same = "yes" if getattr(again, kind) == getattr(plan, kind) else "NO"
    return f"{getattr(again, kind) / getattr(surgery, kind):.2%}", same


def timed(
    surgery: surgeon.Surgery, model: nn.Module, image: Tensor, kind: str, share: float, round_to: int | str
) -> tuple[str, str]:
    """What was measured, with its interval."""
    told = surgery.plan(latency=share, round_to=round_to).request["measured"]
    low, high = told["interval"]
    return (
        f"{told['ms'] / told['original_ms']:.1%} [{low:.1%}, {high:.1%}], {told['candidates']} candidates",
        "",
    )


def count_rows() -> list[list[str]]:
    rows = []
    timm = [name for name in names(False) if name.startswith("timm/")][::5][:20]
    for name in [*(f"torchvision/{n}" for n in NAMES), *timm]:
        try:
            model, image = build(name)
            surgery = surgeon.inspect(model, image)
            plan = surgery.plan(0.5)
            small = plan.apply(model)
            macs, params = counted(small, image)
            exact = surgeon.inspect(small, image)
            same = (exact.macs, exact.params) == (plan.macs, plan.params) and params == plan.params
            rows.append(
                [
                    name,
                    f"{plan.macs:,}",
                    f"{macs:,}",
                    f"{plan.macs / macs - 1:+.3%}",
                    f"{plan.params:,}",
                    "yes" if same else "NO",
                ]
            )
        except Exception as error:  # noqa: BLE001  # the table says what failed
            rows.append([name, first_line(error), *[""] * 4])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(FIVE))
    parser.add_argument(
        "--latency", nargs="*", type=float, default=[0.7, 0.5], help="shares of the original's"
    )
    parser.add_argument("--counts", action="store_true")
    parser.add_argument(
        "--fresh", nargs="*", default=[], choices=[*KINDS, "latency"], help="measure these again"
    )
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if chosen.counts:
        header = [
            "model",
            "MACs predicted",
            "by torch's counter",
            "difference",
            "params predicted",
            "equal to the small model's",
        ]
        notes = [
            "Channel ratio 0.5. 'equal': MACs and params predicted before the cut are exactly those of the small model."
        ]
        write_result("counts", "Predicted and counted", markdown(header, count_rows()), notes)
        return
    rows = [row for name in chosen.models for row in budget_rows(name, chosen.latency, chosen.fresh)]
    header = ["model", "budget", "asked", "round_to", "reached", "as predicted"]
    notes = [
        "Random weights (CIFAR ResNet-56: trained), l1, shared out by the knapsack; batch 1.",
        (
            "Budgets are met from below; with round_to=auto a step is a block of channels, so that budgets are met less closely. "
            "What is refused under auto is tried with round_to=1."
        ),
        "latency: measured after the choice, fused, ONNX Runtime, one thread, process CPU time, with a 95 % bootstrap interval.",
    ]
    write_result("budgets", "Budgets asked and reached", markdown(header, rows), notes)


if __name__ == "__main__":
    main()
