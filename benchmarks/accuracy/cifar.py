"""ResNet-20 and ResNet-56 on CIFAR-10: what cutting channels costs before any recovery, and what it gains on
this CPU.

Real weights and all 10,000 test images. The residual stream is cut with everything else, through the
zero-padded shortcuts.

    python -m benchmarks.accuracy.cifar [--data DIR]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgeon
from benchmarks.lib.cifar_data import MODELS, data_parser, read_images, require, top1
from benchmarks.lib.cifar_resnet import CifarResNet
from benchmarks.lib.results import markdown, write_result

RATIOS = (0.3, 0.5, 0.7)
ROUNDS = {1: 100, 64: 15}  # batch size -> timed rounds
FILES = ["cifar10-test.npz", *(f"cifar10-{name}-adapted.safetensors" for name in MODELS)]


def stream(model: CifarResNet) -> str:
    """Channels of the residual stream in the three stages."""
    return " / ".join(
        str(layer.out_channels) for layer in (model.conv1, model.layer2[0].conv2, model.layer3[0].conv2)
    )


def speed_ups(models: dict[str, nn.Module], images: Tensor, folder: Path) -> dict[str, list[str]]:
    """Name -> its speed-up over the first model in torch and ONNX Runtime, for each batch size; one
    thread.
    """
    files = {}
    for name, model in models.items():
        files[name] = folder / f"{name}.onnx"
        print(surgeon.export(surgeon.fuse(model, images[:1]), files[name], images[:1]))
    found: dict[str, list[str]] = {name: [] for name in models}
    for entries in (models, files):
        for batch, rounds in ROUNDS.items():
            table = surgeon.bench(entries, images[:batch], threads=1, repeats=rounds)
            print(table)
            for row in table.rows:
                ms = f"{row.p50:.1f} ms"
                found[row.name].append(
                    ms if row.ratio is None else f"{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"
                )
    return found


def rows_of(kind: str, data: Path, images: Tensor, labels: Tensor) -> list[list[str]]:
    """The table's rows of one network: the base, then one for each ratio."""
    base = MODELS[kind]().eval()
    base.load_state_dict(load_file(data / f"cifar10-{kind}-adapted.safetensors"))
    surgery = surgeon.inspect(base, images[:1])
    models: dict[str, nn.Module] = {kind: base}
    params, macs = f"{surgery.params:,}", f"{surgery.macs:,}"
    cells = {kind: [stream(base), "-", params, macs, f"{top1(base, images, labels):.2%}"]}
    for ratio in RATIOS:
        plan = surgery.plan(ratio, criterion="l1", scope="uniform", round_to=1)
        small = plan.apply(base)
        proof = surgeon.verify(base, small, plan, images[:1], graph=surgery.graph)
        name = f"{kind} -{ratio:.0%}"
        models[name] = small
        params, macs = f"{plan.params / surgery.params:.1%}", f"{plan.macs / surgery.macs:.1%}"
        cells[name] = [
            stream(small),
            f"{proof.error:.1e}",
            params,
            macs,
            f"{top1(small, images, labels):.2%}",
        ]
        print(name, cells[name])
    with tempfile.TemporaryDirectory() as folder:
        times = speed_ups(models, images, Path(folder))
    return [[name, *cells[name], *times[name]] for name in models]


def main() -> None:
    """Measure both networks and write the table."""
    parser = data_parser(__doc__)
    data = parser.parse_args().data
    require(data, FILES)
    torch.set_num_threads(1)
    images, labels = read_images(data / FILES[0])
    rows = [row for kind in MODELS for row in rows_of(kind, data, images, labels)]
    times = [f"{runtime}, batch {batch}" for runtime in ("torch eager", "ONNX Runtime") for batch in ROUNDS]
    header = ["model", "residual stream", "proof error", "params", "MACs", "top-1, no recovery", *times]
    notes = [
        "CIFAR-10 test images as lossy JPEG (quality about 75); channel ratio as in the name, criterion l1, scope uniform.",
        (
            "residual stream: channels of the three stages. proof error: largest relative error in float64 against the original "
            "with the channels absent."
        ),
        "top-1 directly after the cut: no fine-tuning, no new batch-norm statistics. It is what recovery starts from.",
        (
            "times: the base in ms, then original time / small time (median of interleaved rounds, 95 % interval), one thread; "
            "torch runs the models as they are, ONNX Runtime runs both fused."
        ),
    ]
    write_result("cifar", "CIFAR-10 ResNets, before any recovery", markdown(header, rows), notes)


if __name__ == "__main__":
    main()
