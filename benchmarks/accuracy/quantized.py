"""INT8 and FP16 of the CIFAR-10 ResNet-56 through ONNX Runtime: top-1 on the real test images and size,
before and after.

    python -m benchmarks.accuracy.quantized [--data DIR] [--images 10000]

The ranges of static quantisation come from training images; the top-1 is of test images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import surgeon
from benchmarks.lib.cifar_data import data_parser, read_images
from benchmarks.lib.cifar_resnet import resnet56
from benchmarks.lib.results import markdown, write_result

CALIBRATION = 256
VARIANTS: dict[str, dict[str, Any]] = {
    "int8 static, min-max": {"method": "static"},
    "int8 static, percentile": {"method": "static", "ranges": "percentile"},
    "int8 static, entropy": {"method": "static", "ranges": "entropy"},
    "int8 static, min-max, per tensor": {"method": "static", "per_channel": False},
    "fp16": {"method": "fp16"},
}


def main() -> None:
    """Quantise in every way and write the table."""
    parser = data_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet56().eval()
    model.load_state_dict(load_file(chosen.data / "cifar10-resnet56-adapted.safetensors"))
    images, labels = (part[: chosen.images] for part in read_images(chosen.data / "cifar10-test.npz"))
    calibration = read_images(chosen.data / "cifar10-train.npz", CALIBRATION)[0].split(64)

    def top1(run: Any) -> float:
        right = sum(
            int((run(x)[0].argmax(1) == y.numpy()).sum())
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
        return right / len(labels)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        print(surgeon.export(model, source, images[:1]))
        for name, options in VARIANTS.items():
            report = surgeon.quantize(
                source, Path(folder) / "small.onnx", calibration, evaluate=top1, **options
            )
            print(name, report, flush=True)
            assert report.score_before is not None and report.score_after is not None
            lost = f"{100 * (report.score_before - report.score_after):.2f}"
            share = f"{report.size_after / report.size_before:.3f}"
            worst = f"{report.layers[0].name} ({report.layers[0].added:.3f})"
            rows.append(
                [
                    name,
                    f"{report.score_after:.2%}",
                    lost,
                    f"{report.size_after:,}",
                    share,
                    f"{report.error:.3f}",
                    worst,
                ]
            )
    header = [
        "file",
        "top-1",
        "points lost",
        "bytes",
        "share of float",
        "output error",
        "layer that adds most",
    ]
    rows.insert(0, ["float32", f"{report.score_before:.2%}", "-", f"{report.size_before:,}", "1", "-", "-"])
    notes = [
        f"{len(labels):,} test images of CIFAR-10 (lossy JPEG); ranges from {CALIBRATION} training images.",
        "output error: |quantised - float| / |float| of the logits, 2-norms, on the calibration images.",
    ]
    write_result("quantized", "CIFAR-10 ResNet-56, quantised", markdown(header, rows), notes)


if __name__ == "__main__":
    main()
