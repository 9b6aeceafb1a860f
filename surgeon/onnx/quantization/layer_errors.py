"""What quantisation costs: the error of a file's outputs, and the error that each layer adds, against the
float file.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import QuantizeError
from surgeon.files import silence
from surgeon.onnx.compare import Array
from surgeon.onnx.file import head, open_session, read, save
from surgeon.onnx.quantization import saturation

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class LayerLoss:
    """What quantisation does to one convolution or matrix product.

    Attributes:
        name, op: of the node in the float file.
        error: |quantised - float| / |float| at its output (2-norms over all batches).
        added: the part of it that was not there at its input: sqrt(error^2 - error at the input^2), 0 if it
            shrank.
    """

    name: str
    op: str
    error: float
    added: float


class _Gaps:
    """|b - a| / |a| of each of some values, 2-norms over all batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sums = {name: [0.0, 0.0] for name in names}

    def add(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        for sums, a, b in zip(self._sums.values(), first, second, strict=True):
            exact, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
            with np.errstate(invalid="ignore"):  # masks hold the same infinities in both
                gap = np.where(exact == other, 0.0, other - exact)
            sums[0] += float((gap**2).sum())
            sums[1] += float((exact[np.isfinite(exact)] ** 2).sum())

    def __call__(self) -> dict[str, float]:
        return {
            name: (gap / (scale or 1.0)) ** 0.5 if scale or not math.isfinite(gap) else float(gap > 0)
            for name, (gap, scale) in self._sums.items()
        }


def output_error(before: Any, after: Any, feeds: list[dict[str, Array]]) -> float:
    """The largest error of an output, given a session of each file."""
    gaps = _Gaps([item.name for item in before.get_outputs()])
    for fed in feeds:
        gaps.add(before.run(None, fed), after.run(None, fed))
    return max(gaps().values())


def layer_losses(source: Path, draft: Path, feeds: list[dict[str, Array]]) -> tuple[LayerLoss, ...]:
    """Every product whose result both files have, by the error that it adds."""
    graph, small = read(source).graph, read(draft).graph
    kept = {name for node in small.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results: dict[
        str, str
    ] = {}  # a value -> what it is called, perhaps after its activation, which quantisation takes in
    for name in [name for node in graph.node for name in node.output]:
        after = readers.get(name, [])
        found = [n for n in (name, *(after[0].output[:1] if len(after) == 1 else ())) if n in kept]
        results.update({name: found[0]} if found else {})
    nodes = [node for node in graph.node if node.op_type in PRODUCTS and node.output[0] in results]
    ends = [(results.get(node.input[0]), results[node.output[0]]) for node in nodes]
    names = list(dict.fromkeys(name for pair in ends for name in pair if name is not None))
    rounded = [f"{name}_DequantizeLinear_Output" for name in names]  # as the next layer reads it
    twins = [twin if twin in kept else name for name, twin in zip(names, rounded, strict=True)]
    gaps = _Gaps(names)
    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        float_file = _watching(source, names, Path(folder) / "float.onnx")
        small_file = _watching(draft, twins, Path(folder) / "small.onnx")
        for fed in feeds if names else ():
            gaps.add(float_file.run(names, fed), small_file.run(twins, fed))
        del float_file, small_file  # they hold the files open
    errors = gaps()
    losses = []
    for node, (before, after_node) in zip(nodes, ends, strict=True):
        here, there = errors[after_node], errors.get(before or "", 0.0)
        losses.append(LayerLoss(node.name, node.op_type, here, max(here**2 - there**2, 0.0) ** 0.5))
    return tuple(sorted(losses, key=lambda loss: -loss.added))


def _watching(path: Path, names: list[str], copy: Path) -> Any:
    """A session of the file that also gives these values."""
    import onnx

    proto = read(path, weights=True)
    known = {item.name for item in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    save(proto, copy)
    try:
        with silence():
            return open_session(copy, exact=saturation.products_saturate())
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        fix = "use another method, or name the node in ignore=[...]"
        raise QuantizeError(
            "ONNX Runtime cannot run the file", where=str(path), why=head(str(error)), fix=fix
        ) from error
