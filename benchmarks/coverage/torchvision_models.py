"""Half of the channels out of 15 torchvision models: what is left, the proof, batch norms folded, the ONNX
file checked.

python -m benchmarks.coverage.torchvision_models [--models resnet50 vit_b_32]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import surgeon
from benchmarks.lib.results import first_line, markdown, write_result
from benchmarks.lib.zoo.models import NAMES, build, classifiers
from surgeon.fusion.fuse import fusable_pairs

RATIO = 0.5
EXPLAIN_ABOVE = 0.32  # share of params left from which the reason is looked for; (1 - RATIO)^2 is 0.25
OTHER_BATCH = 4  # surgeon.export itself compares on 2 and 3
BATCH_OF_NORMS = 4
HEADER = [
    "model",
    "params",
    "MACs",
    "proof error",
    "surgery s",
    "verify s",
    "pairs",
    "fuse error",
    "ONNX error",
]


def train_norms(model: nn.Module, image: Tensor) -> None:
    """Batch norms as after training: random scales and shifts, statistics of a few random images.

    Without this, most of a deep random network is close to constant, and neither a wrong cut nor a wrong fold
    would show.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.data.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        norm.bias.data.copy_(torch.rand(norm.bias.shape, generator=generator) * 0.4 - 0.2)
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(BATCH_OF_NORMS, *image.shape[1:], generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def fuse_error(small: nn.Module, image: Tensor) -> tuple[int, float]:
    """Number of folded pairs, and max |fused - small| / max |small| in float64."""
    exact, x = copy.deepcopy(small).double(), image.double()
    pairs = fusable_pairs(exact, x)
    fused = surgeon.fuse(exact, x)
    with torch.no_grad():
        want, got = exact(x), fused(x)
    return len(pairs), float((got - want).abs().max() / want.abs().max())


def onnx_error(small: nn.Module, image: Tensor) -> float:
    """max |onnx - torch| / max |torch| on fresh images of a batch size that the file was not exported
    with.
    """
    x = torch.randn(OTHER_BATCH, *image.shape[1:], generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        surgeon.export(surgeon.fuse(small, image), path, image)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        want = small(x).numpy()
    return float(np.abs(got - want).max() / np.abs(want).max())


def why_large(model: nn.Module, surgery: surgeon.Surgery, share: float) -> str:
    """Why more params stay than the square of the ratio: what is frozen or tied."""
    heads = {id(parameter) for layer in classifiers(model) for parameter in layer.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if id(parameter) in heads) / total
    expected = frozen * (1 - RATIO) + (1 - frozen) * (1 - RATIO) ** 2
    return (
        f"{share:.1%} of params left: {frozen:.1%} of the original's lie in the classifier, whose outputs stay, so that it only "
        f"loses inputs; that alone makes {expected:.1%}. {rest(surgery)}"
    )


def rest(surgery: surgeon.Surgery) -> str:
    """The steps of the groups, and the frozen part of the print-out without kernels and classes."""
    coarse = [group for group in surgery.groups if group.steps < group.width]
    ties = [
        f"`{g.name}` {g.width} channels in {g.steps} steps"
        for g in sorted(coarse, key=lambda g: -g.width)[:4]
    ]
    text = f"{len(coarse)} of {len(surgery.groups)} groups leave in steps of several channels"
    frozen = [
        f"`{item.slots[0][0]}[{item.slots[0][1]}]` ({item.reason})"
        for item in surgery.frozen
        if "kernel" not in item.reason
    ]
    return text + (f" ({', '.join(ties)})" if ties else "") + f". Frozen: {', '.join(frozen[:4])}."


def row_of(name: str) -> tuple[list[str], list[str]]:
    """One row, and a note if much is left."""
    model, image = build(name)
    train_norms(model, image)
    start = time.perf_counter()
    surgery = surgeon.inspect(model, image)
    plan = surgery.plan(RATIO, round_to=1)
    small = plan.apply(model)
    cut = time.perf_counter()
    proof = surgeon.verify(model, small, plan, image, graph=surgery.graph)
    verified = time.perf_counter()
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    row = [name, f"{share:.1%}", f"{plan.macs / surgery.macs:.1%}", f"{proof.error:.1e}"]
    row += [f"{cut - start:.2f}", f"{verified - cut:.2f}"]
    notes = [f"{name}: {why_large(model, surgery, share)}"] if share > EXPLAIN_ABOVE else []
    try:
        pairs, error = fuse_error(small, image)
        row += [str(pairs), f"{error:.1e}", f"{onnx_error(small, image):.1e}"]
    except Exception as error:  # noqa: BLE001  # the row says which model fails, and how; the others still run
        row += [first_line(error)]
    return row + [""] * (len(HEADER) - len(row)), notes


def main() -> None:
    """Run the models one after the other and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    torch.set_num_threads(1)  # steady times on a busy machine
    rows, reasons = [], []
    for name in parser.parse_args().models:
        try:
            row, notes = row_of(name)
        except Exception as error:  # noqa: BLE001  # the row says which model fails, and how; the others still run
            row, notes = [name, first_line(error), *[""] * (len(HEADER) - 2)], []
        print(*row, *notes, sep="  ", flush=True)
        rows.append(row)
        reasons += notes
    notes = [
        f"Random weights (seed 0), random batch-norm scales, statistics of {BATCH_OF_NORMS} random images.",
        f"Channel ratio {RATIO:.0%}, criterion l1, scope uniform. params, MACs: share left.",
        "proof error: largest relative error in float64 against the original with the channels absent.",
        "surgery: inspect + plan + apply; verify apart; seconds with one thread.",
        "pairs: conv + batch norm folded in the small model; fuse error: max |fused - unfused| / max |unfused| in float64.",
        (
            f"ONNX error: fused small model in ONNX Runtime against the unfused one in torch (float32), batch {OTHER_BATCH}, "
            "max |difference| / max |torch|."
        ),
    ]
    write_result(
        "torchvision", "15 torchvision models, half of the channels", markdown(HEADER, rows), notes + reasons
    )


if __name__ == "__main__":
    main()
