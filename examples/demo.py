"""The whole way on real data: train, look, cut, prove, fine-tune, fuse, export, measure.

    python examples/demo.py --out demo

Handwritten digits (8x8 pixels, scikit-learn carries them) and a small residual network with everything that
makes cutting hard: residual additions, grouped convolutions, squeeze-and-excitation. Takes one to two minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import surgeon

Data = tuple[Tensor, Tensor]  # images, labels


# -- the model: nothing here knows of pruning ----------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Scale each channel by what the whole picture says of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """Convolution, grouped convolution, squeeze-and-excitation, and the addition that ties their channels."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.excite = SqueezeExcite(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.excite(self.bn2(self.conv2(y)))
        return F.relu(y + self.skip(x))


class DigitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = nn.Sequential(Block(64, 64), Block(64, 128, stride=2), Block(128, 128))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


# -- an ordinary training loop: before and after the surgery the same ----------------------------------------


def train(model: nn.Module, data: Data, epochs: int, rate: float, title: str) -> None:
    images, labels = data
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    for _ in track(range(epochs), description=title):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def shifted(images: Tensor) -> Tensor:
    """Each batch moved by up to one pixel, so that the model learns shapes rather than places."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[..., 1 + down : 9 + down, 1 + right : 9 + right]


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def digits() -> tuple[Data, Data]:
    """Train and test split."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(
        pixels.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.3, random_state=0, stratify=labels
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in split)
    return (x_train.float(), y_train), (x_test.float(), y_test)


# -- the surgery ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train, cut, prove, fine-tune, export and measure a small network."
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # one epoch: for the tests
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    say = console.print if console.is_terminal else Console(width=150).print
    torch.manual_seed(options.seed)
    epochs, repair_epochs, repeats = (1, 1, 8) if options.quick else (25, 8, 100)

    say("[bold]1. Train[/bold] a residual network on handwritten digits")
    train_data, test_data = digits()
    model = DigitNet()
    train(model, train_data, epochs, rate=3e-3, title="training")
    before = accuracy(model, test_data)
    say(f"test accuracy {before:.2%}\n")

    say("[bold]2. Look[/bold] at what can leave")
    x = test_data[0][:1]
    surgery = surgeon.inspect(model, x)
    print(surgery, "\n")

    say("[bold]3. Cut[/bold] half of the channels of every group")
    plan = surgery.plan(ratio=0.5)
    small = plan.apply(model)  # a new module of the same class; `model` is untouched
    print(plan, "\n")

    say("[bold]4. Prove[/bold] that the small model computes what the original does without those channels")
    proof = surgeon.verify(model, small, plan, x)
    print(proof)
    as_cut = accuracy(small, test_data)
    say(f"test accuracy as cut {as_cut:.2%}\n")

    say("[bold]5. Recover[/bold] without labels: layer by layer, from the pictures alone")
    found = surgeon.recover(small, plan, model, train_data[0].split(128))
    small = found.model
    print(found)
    recovered = accuracy(small, test_data)
    say(f"test accuracy {recovered:.2%}\n")

    say("[bold]6. Fine-tune[/bold] with the same loop, only shorter")
    train(small, train_data, repair_epochs, rate=2e-3, title="fine-tuning")
    after = accuracy(small, test_data)
    say(f"test accuracy {after:.2%}\n")

    say("[bold]7. Save and export[/bold], batch norms folded into the convolutions")
    plan.save(
        out / "plan.json"
    )  # to make the small model again: Plan.load(path).apply(DigitNet()), then load its weights
    safetensors.torch.save_model(small, str(out / "small.safetensors"))
    original_file = surgeon.export(surgeon.fuse(model, x), out / "original.onnx", x)
    small_file = surgeon.export(surgeon.fuse(small, x), out / "small.onnx", x)
    print(f"{original_file}\n{small_file}\n")

    say("[bold]8. Measure[/bold], 64 pictures at once, all four in turns")
    models = {
        "original, torch": model,
        "small, torch": small,
        "original, ONNX": original_file.path,
        "small, ONNX": small_file.path,
    }
    times = surgeon.bench(models, x, batch_size=64, repeats=repeats)
    say(times.rich())

    p50 = {row.name: row.p50 for row in times.rows}
    rows = [
        ("test accuracy", f"{before:.2%}", f"{after:.2%}"),
        ("  as cut; recovered", "", f"{as_cut:.2%}; {recovered:.2%}"),
        (
            "parameters",
            f"{plan.params_before:,}",
            f"{plan.params:,} ({plan.params / plan.params_before:.0%})",
        ),
        ("MACs per picture", f"{plan.macs_before:,}", f"{plan.macs:,} ({plan.macs / plan.macs_before:.0%})"),
        ("ONNX file, bytes", f"{original_file.size_bytes:,}", f"{small_file.size_bytes:,}"),
        ("latency, torch, ms", f"{p50['original, torch']:.2f}", f"{p50['small, torch']:.2f}"),
        ("latency, ONNX Runtime, ms", f"{p50['original, ONNX']:.2f}", f"{p50['small, ONNX']:.2f}"),
    ]
    result = Table("", "original", "small", title="Result")
    for row in rows:
        result.add_row(*row)
    say(result)

    lines = ["# Digits, half of the channels removed", "", "| | original | small |", "| --- | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"Surgery {proof}.",
        "",
        "ONNX files, against torch:",
        "",
        f"- {original_file}",
        f"- {small_file}",
    ]
    lines += ["", "## Latency", "", times.markdown(), ""]
    (out / "report.md").write_text("\n".join(lines))
    say(f"written: {', '.join(sorted(file.name for file in out.iterdir()))} in {out}/")


if __name__ == "__main__":
    main()
