"""Structured lottery tickets: the channels that a training finds, with the weights that they had before it.

    python examples/lottery.py

A plan fits other weights of the same model. So a plan made from trained weights and applied to the model as
it was *before* training is a ticket: `plan.apply(start)`. Iterative rewinding repeats it: train the ticket,
cut half of the rest, rewind (Frankle and Carbin, The Lottery Ticket Hypothesis, 2019); `compose` makes one
plan of those of all rounds. Late rewinding goes back to a few steps after the start (Frankle et al.,
Stabilizing the Lottery Ticket Hypothesis, 2019). Three rivals of the same shape tell whether the channels or
the weights matter: random channels with their starting weights, the ticket's channels with fresh weights, and
the trained weights themselves, fine-tuned.

Handwritten digits (scikit-learn carries them); some seconds a seed on one core.
"""

from __future__ import annotations

import argparse
import copy
import statistics

from demo import Data, accuracy, digits
from rich.console import Console
from rich.table import Table
from torch import Tensor, manual_seed, nn

import surgeon


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.c, self.head = nn.Linear(64 * 4 * 4, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu().flatten(1)).relu())


def fresh(seed: int) -> Net:
    manual_seed(seed)
    return Net()


def train(model: nn.Module, data: Data, seed: int, epochs: int, steps: int | None = None) -> nn.Module:
    """A trained copy; `model` stays as it is."""
    batches = list(zip(data[0].split(64), data[1].split(64), strict=True))
    return surgeon.finetune(
        copy.deepcopy(model), batches, epochs=epochs, steps=steps, rate=2e-3, schedule="constant", seed=seed
    ).model


def plans(
    start: nn.Module, data: Data, seed: int, epochs: int, rounds: int
) -> tuple[list[surgeon.Plan], nn.Module]:
    """Train, cut half of the channels of every group by the trained weights, rewind, again; and the last
    trained weights, cut.
    """
    found = []
    for _ in range(rounds):
        trained = train(start, data, seed, epochs)
        found.append(surgeon.inspect(trained, data[0][:1]).plan(0.5, round_to=1))
        start = found[-1].apply(start)
    return found, found[-1].apply(trained)


def random_plans(start: nn.Module, data: Data, seed: int, rounds: int) -> list[surgeon.Plan]:
    """Of the same widths, but blind."""
    found = []
    for number in range(rounds):
        found.append(
            surgeon.inspect(start, data[0][:1]).plan(
                0.5, round_to=1, criterion="random", seed=100 * seed + number
            )
        )
        start = found[-1].apply(start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare structured lottery tickets with random ones of the same shape."
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="each halves every width")
    parser.add_argument(
        "--quick", action="store_true", help=argparse.SUPPRESS
    )  # one seed, few epochs: for the tests
    options = parser.parse_args()
    seeds, rounds, epochs = (1, 2, 1) if options.quick else (options.seeds, options.rounds, 6)
    console = Console()
    say = console.print if console.is_terminal else Console(width=130).print

    train_data, test_data = digits()
    scores: dict[str, list[float]] = {}
    for seed in range(seeds):
        start = fresh(seed)
        late = train(start, train_data, seed, epochs=1, steps=10)
        early_plans, trained = plans(start, train_data, seed, epochs, rounds)
        late_plans, _ = plans(late, train_data, seed, epochs, rounds)
        blind = random_plans(start, train_data, seed, rounds)
        whole = surgeon.inspect(start, train_data[0][:1])
        early_ticket, late_ticket, blind_ticket = (
            whole.compose(found) for found in (early_plans, late_plans, blind)
        )
        rivals = {
            "whole network": start,
            "ticket, rewound to the start": early_ticket.apply(start),
            "ticket, rewound to step 10": late_ticket.apply(late),
            "random channels, their starting weights": blind_ticket.apply(start),
            "the ticket's channels, fresh weights": early_ticket.apply(fresh(1000 + seed)),
            "trained weights, fine-tuned": trained,
        }
        widths = {
            tuple(tuple(p.shape) for p in model.parameters())
            for name, model in rivals.items()
            if name != "whole network"
        }
        assert len(widths) == 1, "all rivals have the same shape"
        for name, model in rivals.items():
            scores.setdefault(name, []).append(accuracy(train(model, train_data, seed, epochs), test_data))
        params = {name: sum(p.numel() for p in model.parameters()) for name, model in rivals.items()}

    table = Table(
        "", "params", "test accuracy", "worst and best", title=f"{epochs} epochs each, {seeds} seeds"
    )
    for name, found in scores.items():
        table.add_row(
            name,
            f"{params[name]:,}",
            f"{statistics.mean(found):.2%}",
            f"{min(found):.2%} to {max(found):.2%}",
        )
    say(table)


if __name__ == "__main__":
    main()
