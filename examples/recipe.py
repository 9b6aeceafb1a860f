"""The whole recipe on real data: train, prune by a schedule with fine-tuning in between, down to an accuracy
floor; fuse, export, compare.

    python examples/recipe.py --out recipe

Each step of the schedule cuts a little more, then fine-tunes with gradient clipping and with the original
network as the teacher. The loop ends when the budget is met or the accuracy on held-out digits falls below
the floor; the last network above it is kept. Test digits are looked at once, at the end. Handwritten digits
(scikit-learn carries them); about a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from demo import Block, accuracy, digits, shifted
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import surgeon
from surgeon.training import Distillation


class Net(nn.Module):
    """Residual blocks with grouped convolutions and squeeze-and-excitation (see demo.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 32), Block(32, 64, stride=2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Shifted:
    """Batches in random order, moved by up to one pixel: a small loader with augmentation."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 64) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.images)).split(self.size):
            yield shifted(self.images[batch]), self.labels[batch]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prune a small network step by step, down to an accuracy floor."
    )
    parser.add_argument("--out", type=Path, default=Path("recipe"), help="folder for the results")
    parser.add_argument("--macs", type=float, default=0.25, help="share of the MACs that may stay")
    parser.add_argument(
        "--loss", type=float, default=0.02, help="accuracy on held-out digits that may be lost"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # few epochs: for the tests
    options = parser.parse_args()
    epochs, repair, steps, repeats = (1, 1, 2, 8) if options.quick else (15, 8, 4, 100)
    floor = 1.0 if options.quick else options.loss
    console = Console()
    say = console.print if console.is_terminal else Console(width=130).print
    torch.manual_seed(options.seed)

    (images, labels), test_data = digits()
    held = images[:250], labels[:250]  # the split is shuffled
    train = Shifted(images[250:], labels[250:])

    model = Net()
    surgeon.finetune(model, train, epochs=epochs, rate=3e-3, clip=("norm", 1.0), seed=options.seed)
    score = accuracy(model, held)
    say(f"trained: held-out accuracy {score:.2%}\n")

    run = surgeon.iterate(
        model, macs=options.macs, steps=steps, schedule="cubic", example_inputs=images[:1],
        score=lambda small: accuracy(small, held), floor=score - floor,
    )  # fmt: skip
    for step in run:
        done = surgeon.finetune(
            step.model, train, epochs=repair, rate=3e-3, clip=("norm", 1.0), teacher=model,
            distillation=Distillation(temperature=4, weight=0.5), evaluate=[held], keep="last", seed=step.number,
        )  # fmt: skip
        last = done.history[-1]
        say(
            f"step {step.number}: {step.plan.macs:,} MACs, loss {last.loss:.3f}, held-out accuracy {last.score:.2%}"
        )
    small = run.model.eval()
    say(f"{'stopped: ' + run.stopped if run.stopped else 'the budget is met'}\n")
    if small is model:
        say("no step met the floor: nothing was pruned")
        return

    x = test_data[0][:1]
    folder: Path = options.out
    surgeon.save(small, folder / "small")  # its plans and weights; surgeon.load(folder, Net) brings it back
    files = [
        surgeon.export(surgeon.fuse(m, x), folder / f"{n}.onnx", x)
        for n, m in (("original", model), ("small", small))
    ]
    times = surgeon.bench(
        {"original": files[0].path, "small": files[1].path}, x, batch_size=64, repeats=repeats
    )
    p50 = {row.name: row.p50 for row in times.rows}
    params = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    macs = [surgeon.inspect(m, x).macs for m in (model, small)]
    tested = [accuracy(m, test_data) for m in (model, small)]

    table = Table("", "original", "small", "", title="Result, on test digits")
    table.add_row(
        "parameters", f"{params[0]:,}", f"{params[1]:,}", f"{params[0] / params[1]:.1f} times fewer"
    )
    table.add_row(
        "sparsity", "0.0%", f"{1 - params[1] / params[0]:.1%}", "of the original's parameters are gone"
    )
    table.add_row("MACs per picture", f"{macs[0]:,}", f"{macs[1]:,}", f"{macs[0] / macs[1]:.1f} times fewer")
    sizes = [file.size_bytes for file in files]
    table.add_row(
        "ONNX file, bytes", f"{sizes[0]:,}", f"{sizes[1]:,}", f"compression ratio {sizes[0] / sizes[1]:.1f}"
    )
    speed = p50["original"] / p50["small"]
    table.add_row(
        "latency, ONNX Runtime, ms", f"{p50['original']:.2f}", f"{p50['small']:.2f}", f"speed-up {speed:.2f}"
    )
    table.add_row(
        "accuracy", f"{tested[0]:.2%}", f"{tested[1]:.2%}", f"{100 * (tested[1] - tested[0]):+.2f} points"
    )
    say(table)


if __name__ == "__main__":
    main()
