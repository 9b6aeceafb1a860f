"""What benchmarks/accuracy/recover.py measures: a base network, samples to calibrate by, and scores on data that was
held out.

Calibration samples and those that choose among the rival's options come from the training data, by seed; the
test data is read by `Task.test` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.accuracy.recover_models import Shuffled, documentation, next_byte_loss, trained
from benchmarks.accuracy.recover_sentences import contrast, nearest, pairs, pretrained
from benchmarks.lib.cifar_data import MODELS, normalised, read_pixels, top1

SAMPLES, TEXTS, HELD_OUT = 2000, 512, 1000
Pairs = list[tuple[Tensor, Tensor]]


class Task:
    """One network and its data.

    Attributes:
        metric: what `held_out` and `test` give. sign: 1 if higher is better, else -1.
        stream: whether torch-pruning's cuts of the residual stream are worth trying.
    """

    metric: str
    sign: int
    stream: bool = True
    loss: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, name: str, base: nn.Module) -> None:
        self.name, self.base = name, base

    def calibration(self, seed: int) -> Pairs:
        """Batches of samples with their targets, which only the rival may look at."""
        raise NotImplementedError

    def held_out(self, model: nn.Module, seed: int) -> float:
        """The metric on training data that is not among the calibration samples."""
        raise NotImplementedError

    def test(self, model: nn.Module) -> float:
        """The metric on the test data."""
        raise NotImplementedError

    def train(self, count: int, batch: int = 128) -> Shuffled:
        """Batches of the first `count` training samples, augmented."""
        raise NotImplementedError

    def inner(self, name: str) -> bool:
        """Whether a layer's outputs are inside of a block, not of the residual stream."""
        raise NotImplementedError


@functools.cache
def pixels_of(file: Path) -> tuple[Tensor, Tensor]:
    return read_pixels(file)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class Images(Task):
    """CIFAR-10: a ResNet with the weights at hand, or the vision transformer."""

    metric, sign = "top-1", 1
    loss = staticmethod(F.cross_entropy)

    def __init__(self, name: str, data: Path) -> None:
        self.data = data
        if name in MODELS:
            self.stream = (
                False  # torch-pruning mistakes the zero-padded shortcuts: see the notes of the table
            )
            base: nn.Module = MODELS[name]().eval()
            base.load_state_dict(load_file(data / f"cifar10-{name}-adapted.safetensors"))
        else:
            base = trained(name, lambda: self.train(50_000), F.cross_entropy)
        super().__init__(name, base)

    def calibration(self, seed: int) -> Pairs:
        pixels, labels = pixels_of(self.data / "cifar10-train.npz")
        chosen = _order(len(labels), seed)[:SAMPLES]
        return list(zip(normalised(pixels[chosen]).split(100), labels[chosen].split(100), strict=True))

    def held_out(self, model: nn.Module, seed: int) -> float:
        pixels, labels = pixels_of(self.data / "cifar10-train.npz")
        chosen = _order(len(labels), seed)[SAMPLES : SAMPLES + HELD_OUT]
        return top1(model, normalised(pixels[chosen]), labels[chosen])

    def test(self, model: nn.Module) -> float:
        pixels, labels = pixels_of(self.data / "cifar10-test.npz")
        return top1(model, normalised(pixels), labels)

    def train(self, count: int, batch: int = 128) -> Shuffled:
        pixels, labels = pixels_of(self.data / "cifar10-train.npz")
        return Shuffled(
            min(count, len(labels)),
            batch,
            lambda chosen: (_augmented(normalised(pixels[chosen])), labels[chosen]),
        )

    def inner(self, name: str) -> bool:
        return name.endswith(("conv1", "query", "key", "value", "up")) and name != "conv1"


def _augmented(images: Tensor) -> Tensor:
    """Each image moved by up to four pixels and mirrored or not (He et al., 2015)."""
    padded = F.pad(images, (4, 4, 4, 4))
    count = len(images)
    down, right = (
        torch.randint(9, (count, 1, 1)) + torch.arange(32).view(shape) for shape in ((1, -1, 1), (1, 1, -1))
    )
    right = torch.where(torch.rand(count, 1, 1) < 0.5, right, right.flip(2))
    return (
        padded.permute(0, 2, 3, 1)[torch.arange(count).view(-1, 1, 1), down, right]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


class Text(Task):
    """Python's documentation, byte by byte."""

    metric, sign = "bits per byte", -1
    loss = staticmethod(next_byte_loss)

    def __init__(self, name: str, data: Path) -> None:
        self.texts, self.tests = documentation()
        super().__init__(name, trained(name, lambda: self.train(len(self.texts)), next_byte_loss))

    def calibration(self, seed: int) -> Pairs:
        chosen = self.texts[_order(len(self.texts), seed)[:TEXTS]].long()
        return [(part[:, :-1], part[:, 1:]) for part in chosen.split(32)]

    def held_out(self, model: nn.Module, seed: int) -> float:
        return _bits(model, self.texts[_order(len(self.texts), seed)[TEXTS : 2 * TEXTS]])

    def test(self, model: nn.Module) -> float:
        return _bits(model, self.tests)

    def train(self, count: int, batch: int = 16) -> Shuffled:
        def make(chosen: Tensor) -> tuple[Tensor, Tensor]:
            texts = self.texts[chosen].long()
            return texts[:, :-1], texts[:, 1:]

        return Shuffled(min(count, len(self.texts)), batch, make)

    def inner(self, name: str) -> bool:
        return name.endswith(("query", "key", "value", "up"))


@torch.inference_mode()
def _bits(model: nn.Module, texts: Tensor) -> float:
    sums = [
        float(next_byte_loss(model(part[:, :-1]), part[:, 1:])) * len(part) for part in texts.long().split(64)
    ]
    return sum(sums) / len(texts) / 0.6931471805599453


class Embeddings(Task):
    """A published sentence-embedding model, scored by retrieval."""

    metric, sign = "retrieval top-1", 1
    loss = staticmethod(contrast)

    def __init__(self, name: str, data: Path) -> None:
        self.pairs, self.tests = pairs()
        super().__init__(name, pretrained())

    def calibration(self, seed: int) -> Pairs:
        chosen = self.pairs[_order(len(self.pairs), seed)[: TEXTS // 2]]
        return [(part.transpose(0, 1).flatten(0, 1), torch.zeros(())) for part in chosen.split(16)]

    def held_out(self, model: nn.Module, seed: int) -> float:
        return nearest(model, self.pairs[_order(len(self.pairs), seed)[TEXTS // 2 :][:TEXTS]])

    def test(self, model: nn.Module) -> float:
        return nearest(model, self.tests)

    def inner(self, name: str) -> bool:
        return name.endswith(("query", "key", "value", "intermediate.dense"))


TASKS: dict[str, Any] = {
    "resnet20": Images,
    "resnet56": Images,
    "vit": Images,
    "text": Text,
    "sentences": Embeddings,
}
