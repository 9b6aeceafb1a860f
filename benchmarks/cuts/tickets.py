"""Lottery tickets by masks of single weights, on handwritten digits: does the start or the mask matter?

    python -m benchmarks.cuts.tickets [--seeds 3] [--epochs 40]

For each seed a network is trained dense; the smallest of its trained weights are masked (`surgeon.sparsify`, 50, 80, 90 %, each
layer by itself), and the same masks are put on

- its own start (a winning ticket; Frankle and Carbin, The Lottery Ticket Hypothesis, 2019),
- another start (a random ticket),

and, as a control, masks drawn at random are put on its own start. All are trained in the same way, with the masks held.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune

import surgeon
from benchmarks.lib.results import markdown, write_result

AMOUNTS = (0.5, 0.8, 0.9)
KINDS = ("ticket", "random ticket", "random masks")
TRAIN = 600  # images; with all of them every network is near 98 %
RATE, BATCH = 2e-3, 60
Data = tuple[Tensor, Tensor]


def digits() -> tuple[Data, Data]:
    """Images of 8 x 8 and their labels: to train and to test with."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().div(8).sub(1)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


def start(seed: int) -> nn.Module:
    """A network of the size of the paper's, for smaller images: 64-300-100-10."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with these masks."""
    found = copy.deepcopy(model)
    for name, mask in masks.items():
        prune.custom_from_mask(found.get_submodule(name), "weight", mask)
    return found


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a model has, by layer."""
    return {
        name.removesuffix(".weight_mask"): mask.clone()
        for name, mask in model.named_buffers()
        if name.endswith(".weight_mask")
    }


def trained(model: nn.Module, data: Data, epochs: int, seed: int) -> nn.Module:
    """The model, trained."""
    optimizer = torch.optim.Adam(model.train().parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of right answers."""
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


def main() -> None:
    """Train all and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train, test = digits()
    dense: list[float] = []
    found: dict[tuple[float, str], list[float]] = {}
    for seed in range(asked.seeds):
        own, other = start(seed), start(1000 + seed)
        full = trained(start(seed), train, asked.epochs, seed)
        dense.append(accuracy(full, test))
        for amount in AMOUNTS:
            masks = masks_of(surgeon.sparsify(full, amount))
            drawn = masks_of(surgeon.sparsify(full, amount, method="random", seed=seed))
            for kind, begun in zip(
                KINDS, (masked(own, masks), masked(other, masks), masked(own, drawn)), strict=True
            ):
                after = trained(begun, train, asked.epochs, seed)
                assert abs(surgeon.sparsity(after).share - amount) < 1e-3
                found.setdefault((amount, kind), []).append(accuracy(after, test))
    rows = [
        [f"{amount:.0%} zeros", *(shown(found[amount, kind]) for kind in KINDS), shown(dense)]
        for amount in AMOUNTS
    ]
    notes = [
        f"Accuracy in % on {len(test[0]):,} digits beside the {TRAIN} to train on, mean of {asked.seeds} seeds and their range.",
        "Dense kernels gain no time by these zeros.",
    ]
    write_result("tickets", "Lottery tickets by masks", markdown(["", *KINDS, "dense"], rows), notes)


def shown(values: list[float]) -> str:
    """Mean and range, in %."""
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    main()
