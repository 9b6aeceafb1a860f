"""A new head after the cut, as timm users give one: models of 14 families, half of all channels gone,
`reset_classifier`, a step of training, save, load.

    pip install --no-deps timm
    python -m benchmarks.coverage.new_heads [--filter PATTERN] [--fresh | --retry] [--jobs 2]

A row works if the proof passed, the new head has the small model's width and the classes asked for, every parameter that
trained in the original gets a gradient, and the saved folder gives the same outputs where `surgeon.load` puts it together.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.lib.isolated import Row, sweep_of_models
from benchmarks.lib.results import markdown, write_result

CLASSES = 7
NAMES = (
    "resnet18", "mobilenetv2_050", "mobilenetv3_small_100", "efficientnet_b0", "ghostnet_100", "regnety_002",
    "densenet121", "convnext_atto", "repvgg_a0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
    "efficientvit_m0", "vgg11_bn",
)  # fmt: skip
HEADER = ("model", "works", "params left", "width of the head", "parameters that learn", "error after load")


def without_gradient(model: Any, x: Any) -> set[str]:
    """Names of parameters that a step of training does not reach; the step is taken."""
    import torch

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.nn.functional.cross_entropy(model(x), torch.arange(len(x)) % CLASSES).backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if p.grad is None}


def measured(name: str) -> Row:
    """One row, in this process."""
    import torch

    import surgeon
    from benchmarks.lib.zoo.seeded import torchvision_models

    torchvision_models()
    import timm

    def make() -> Any:
        return timm.create_model(name)

    def headed(model: Any) -> None:
        model.reset_classifier(CLASSES)

    torch.manual_seed(0)
    original, x = make().eval(), torch.randn(2, 3, 224, 224)
    before = sum(p.numel() for p in original.parameters())
    small = surgeon.shrink(original, 0.5, example_inputs=x)
    left = sum(p.numel() for p in small.parameters()) / before
    headed(small)
    headed(original)
    missed = without_gradient(small, x) - without_gradient(original, x)
    assert not missed, f"no gradient: {sorted(missed)[:3]}"
    heads = [
        m for m in small.modules() if getattr(m, "out_features", getattr(m, "out_channels", 0)) == CLASSES
    ]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        surgeon.save(small, folder)
        again = surgeon.load(folder, make, after_cut=headed)
        there, here = again.eval()(x), small.eval()(x)
    assert here.shape == (2, CLASSES), f"outputs of shape {tuple(here.shape)}"
    return {
        "left": left,
        "width": [getattr(m, "in_features", getattr(m, "in_channels", 0)) for m in heads],
        "learn": len([*small.parameters()]),
        "error": float((there - here).abs().max()),
    }


def cells(name: str, row: Row) -> list[str]:
    """The row as text."""
    if "failed" in row:
        return [name, f"no: {row['failed']}", "", "", "", ""]
    widths = ", ".join(map(str, row["width"]))
    return [name, "yes", f"{row['left']:.1%}", widths, str(row["learn"]), f"{row['error']:.0e}"]


def main() -> None:
    """Cut all models and write the table."""
    rows = sweep_of_models("new_heads", f"{__package__}.new_heads", __doc__, measured, lambda: NAMES, cells)
    if rows is None:
        return
    works = sum("failed" not in row for row in rows.values())
    notes = [
        f"{works} of {len(rows)} work.",
        "Random weights, ratio 0.5 with the defaults, proof by `shrink`, images 224 x 224, one step of SGD on two of them.",
    ]
    table = markdown(HEADER, [cells(name, row) for name, row in rows.items()])
    write_result("new_heads", "A new head after the cut", table, notes)


if __name__ == "__main__":
    main()
