"""int8 and fp16 files of kinds of layers that runtimes get wrong, and of language and image transformers: right, or refused.

    pip install transformers
    python -m benchmarks.coverage.quantized_kinds [--filter PATTERN] [--fresh | --retry] [--jobs 2]

Each model is cut to half of its channels, exported, and quantised in the three ways; each row in a process of its own, so
that a runtime fault would show as a row that ends. A number is the largest error of an output, as a share of the largest
output of the float file.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.isolated import Row, sweep_of_models
from benchmarks.lib.results import first_line, markdown, write_result

METHODS = ("static", "dynamic", "fp16")
HEADER = ("model", *METHODS)
TRANSFORMERS = ("bert", "gpt2", "llama", "t5", "vit", "swin")


class Recurrent(nn.Module):
    """A recurrent layer and a head for each step."""

    def __init__(self, kind: type[nn.Module], both: bool) -> None:
        super().__init__()
        self.cell = kind(16, 32, batch_first=True, bidirectional=both)
        self.head = nn.Linear(64 if both else 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Masked(nn.Module):
    """Attention in which later positions are not seen, by a number that is added or put in their place."""

    def __init__(self, number: float, put: bool) -> None:
        super().__init__()
        self.number, self.put = number, put
        self.embed, self.qkv, self.out = nn.Linear(16, 32), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x).relu()).chunk(3, -1)
        scores, later = q @ k.mT / math.sqrt(32), torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if self.put:
            scores = scores.masked_fill(later, self.number)
        else:
            scores = scores + torch.zeros(x.shape[1], x.shape[1]).masked_fill(later, self.number)
        return self.out(scores.softmax(-1) @ v)


def _upsampling(groups: int) -> nn.Module:
    layers = [
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=groups), nn.ReLU(),
        nn.Conv2d(32, 5, 1),
    ]  # fmt: skip
    return nn.Sequential(*layers)


_STEPS, _PIXELS = (2, 9, 16), (2, 3, 12, 12)
KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{
        f"{kind.__name__}, {ways}": (lambda kind=kind, ways=ways: Recurrent(kind, ways == "two directions"), _STEPS)
        for kind in (nn.LSTM, nn.GRU)
        for ways in ("one direction", "two directions")
    },
    **{
        f"attention, {number} {'put' if put else 'added'}": (lambda number=number, put=put: Masked(number, put), _STEPS)
        for number in (-math.inf, -1e4)
        for put in (False, True)
    },
    **{f"transposed convolution, {groups} groups": (lambda groups=groups: _upsampling(groups), _PIXELS) for groups in (1, 4, 32)},
}  # fmt: skip
NAMES = (*KINDS, *(f"transformers/{name}" for name in TRANSFORMERS))


def _built(name: str) -> tuple[nn.Module, Any]:
    if name in KINDS:
        make, shape = KINDS[name]
        return make().eval(), torch.randn(shape)
    from benchmarks.lib.zoo.models import build

    return build(name)


def _gap(found: Any, right: Any) -> float:
    """The largest error as a share of the largest number; NaN where a number became none."""
    import numpy as np

    counts = np.isfinite(right)
    return float(np.abs(found[counts] - right[counts]).max() / np.abs(right[counts]).max())


def measured(name: str) -> Row:
    """One row, in this process."""
    import numpy as np
    import onnxruntime

    import surgeon
    from surgeon.errors import SurgeonError

    torch.manual_seed(0)
    model, inputs = _built(name)
    small = surgeon.shrink(model, 0.5, example_inputs=inputs)
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        surgeon.export(small, path, inputs)

        def outputs(file: Path) -> list[Any]:
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            given = inputs if isinstance(inputs, dict) else {session.get_inputs()[0].name: inputs}
            fed = {i.name: given[i.name].numpy() for i in session.get_inputs()}
            return [out for out in session.run(None, fed) if np.issubdtype(out.dtype, np.floating)]

        right = outputs(path)
        for method in METHODS:
            target = Path(folder) / f"{method}.onnx"
            try:
                surgeon.quantize(path, target, [inputs], method=method)
            except SurgeonError as error:
                node = error.where.partition("onnx, ")[2]
                row[method] = f"refused: {first_line(error)}: {error.why[:80]}" + (
                    f", {node}" if node else ""
                )
                continue
            gaps = [_gap(a, b) for a, b in zip(outputs(target), right, strict=True)]
            row[method] = max(gaps)
    return row


def cells(name: str, row: Row) -> list[str]:
    """The row as text."""
    if "failed" in row:
        return [name, f"no: {row['failed']}", "", ""]
    return [name, *(found if isinstance(found, str) else f"{found:.1e}" for found in row.values())]


def main() -> None:
    """Quantise all and write the table."""
    rows = sweep_of_models(
        "quantized_kinds", f"{__package__}.quantized_kinds", __doc__, measured, lambda: NAMES, cells
    )
    if rows is None:
        return
    found = [cell for row in rows.values() for cell in row.values()]
    numbers = [cell for cell in found if isinstance(cell, float)]
    refused = sum(str(cell).startswith("refused") for cell in found)
    ended = sum("failed" in row for row in rows.values())
    notes = [
        (
            f"{len(numbers)} files, {refused} refused with the reason, {ended} rows ended otherwise; "
            f"largest error of a file {max(numbers):.1e}."
        ),
        "Random weights, ratio 0.5 with the defaults; calibrated and compared on the same batch.",
    ]
    table = markdown(HEADER, [cells(name, row) for name, row in rows.items()])
    write_result("quantized_kinds", "Kinds of models as int8 and fp16 files", table, notes)


if __name__ == "__main__":
    main()
