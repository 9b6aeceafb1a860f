"""CIFAR-10 on disk: its images, the networks whose weights lie beside them, and the option of a script that says
where.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.lib.cifar_resnet import resnet20, resnet56
from benchmarks.lib.results import ROOT

MODELS = {"resnet20": resnet20, "resnet56": resnet56}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = Path(os.environ.get("SURGEON_DATA", ROOT.parent / "shared" / "data"))
HOW_TO_GET = """These files are needed in {folder}: {missing}

- cifar10-test.npz: arrays "images" (uint8 [10000, 32, 32, 3], RGB), "labels" (uint8) and "classes". Make it from the test batch
  of https://www.cs.toronto.edu/~kriz/cifar.html with numpy.savez_compressed. (Also read: one JPEG header for all images in
  "header", their scans one after the other in "scans", the ends of these in "offsets".)
- cifar10-NAME-adapted.safetensors: a state dict of the network in benchmarks/lib/cifar_resnet.py. Weights to start from:
  https://github.com/akamaster/pytorch_resnet_cifar10 (strip "module." from the names; fine-tune them if the images differ).

Pass the folder with --data or in the environment variable SURGEON_DATA."""


def data_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a script that reads the data: where it is."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    return parser


def require(folder: Path, files: Iterable[str]) -> None:
    """End with how to get them, unless all are there."""
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        sys.exit(HOW_TO_GET.format(folder=folder, missing=", ".join(missing)))


def read_pixels(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` images (all by default) as uint8 [N, 3, 32, 32], and their labels [N]."""
    with np.load(path, allow_pickle=False) as file:
        labels = file["labels"][:count]
        if "images" in file.files:
            pixels = file["images"][:count]
        else:
            head, scans, ends = file["header"].tobytes(), file["scans"].tobytes(), file["offsets"]
            jpegs = (head + scans[ends[i] : ends[i + 1]] for i in range(len(labels)))
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


def normalised(pixels: Tensor) -> Tensor:
    """Images as the networks take them."""
    return (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def read_images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `count` images (all by default), normalised [N, 3, 32, 32], and their labels [N]."""
    pixels, labels = read_pixels(path, count)
    return normalised(pixels), labels


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that get their label."""
    with torch.inference_mode():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
    return right / len(labels)
