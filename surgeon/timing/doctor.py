"""doctor(file) -> why an ONNX file is not faster on the CPU, op by op, with advice that can be pasted.

The times are ONNX Runtime's own, of the graph that really runs after its fusions. A convolution is on the
fast path if it ran on blocks of channels (NCHWc: 8 wide, 16 with AVX-512); widths that are no multiple of the
block keep it off, or are padded to one and the padding is computed. An op that does few multiply-accumulates
for each byte that it moves waits for memory, and fewer channels help it only as far as they are fewer bytes;
ops of a few microseconds cost what starting them costs.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from surgeon.capture.inputs import normalize
from surgeon.errors import FileError, InputError, SurgeonError
from surgeon.files import silence
from surgeon.onnx.compare import feeds
from surgeon.onnx.file import SCOPES, head, open_session, read
from surgeon.timing.ort_profile import REORDERS, OpTime, profile

_INTENSE = (
    4.0  # MACs per byte from which a core computes longer than it waits for memory: some 60 GMAC/s at 15 GB/s
)
_TINY = 0.01  # ms: an op that takes less is mostly the starting of it
_MUCH = 0.2  # share of the time from which a cause is worth advice
_SLOWER = 0.95  # share of the time before from which a layer has not become faster
_SHOWN = 8
_PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One op that ran, and what is to be said about it.

    Attributes:
        name: path of the module that it comes from, or the op's own name where the file does not say.
        op, ms: kind and median milliseconds.
        before_ms: of the op of the same name in the file before; None without one.
        macs, bytes: multiply-accumulates, and bytes read and written, with the padding that ran.
        widths: (in, out) channels of a convolution in the file; None for other ops.
        fast: whether a convolution ran on the blocked path; None for other ops.
        aligned: the nearest widths that are whole blocks, where the widths are not: ((below, above) in,
            (below, above) out).
    """

    name: str
    op: str
    ms: float
    before_ms: float | None
    macs: int
    bytes: int
    widths: tuple[int, int] | None = None
    fast: bool | None = None
    aligned: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits for memory rather than computes."""
        return self.macs < _INTENSE * self.bytes


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What takes the time, why, and what to do.

    Attributes:
        path: the file.
        ms, before_ms: medians of whole runs; None without a file before.
        block: channels of a block on this machine.
        layers: every op that ran, the slowest first.
        advice: what to change, one line each; arguments can be pasted into `surgery.plan(...)`.
    """

    path: Path
    ms: float
    before_ms: float | None
    block: int
    layers: tuple[Layer, ...]
    advice: tuple[str, ...]

    def share(self, layers: Sequence[Layer]) -> float:
        """Of the time of all ops."""
        return sum(layer.ms for layer in layers) / max(sum(layer.ms for layer in self.layers), 1e-12)

    def __str__(self) -> str:
        before = "" if self.before_ms is None else f" ({self.before_ms:.3f} ms before)"
        out = io.StringIO()
        console = Console(file=out, width=130)
        console.print(
            f"{self.path}: {self.ms:.3f} ms a run{before}, blocks of {self.block} channels", soft_wrap=True
        )
        table = Table()
        for title in ("op", "layer", "ms", "before", "share", "channels", "remarks"):
            table.add_column(
                title, justify="right" if title in ("ms", "before", "share") else "left", overflow="fold"
            )
        for layer in self.layers[:_SHOWN]:
            was = "-" if layer.before_ms is None else f"{layer.before_ms:.3f}"
            widths = "" if layer.widths is None else f"{layer.widths[0]} -> {layer.widths[1]}"
            table.add_row(
                layer.op,
                layer.name,
                f"{layer.ms:.3f}",
                was,
                f"{self.share([layer]):.0%}",
                widths,
                _remarks(layer),
            )
        console.print(table)
        for line in self.advice:
            console.print(f"- {line}", soft_wrap=True, markup=False, highlight=False)
        return out.getvalue().rstrip()


def doctor(
    path: str | os.PathLike[str], before: str | os.PathLike[str] | None = None, example_inputs: Any = None, *,
    threads: int = 1, runs: int = 20,
) -> Diagnosis:  # fmt: skip
    """Say where the time of an ONNX file goes on this CPU, and what to change.

    Args:
        path: the file, as `surgeon.export` writes it.
        before: the file of the model before it was cut, to compare layer by layer.
        example_inputs: a tensor, a tuple or a dict. None: made from the file's input shapes, with a batch of
            1.
        threads: intra-op threads.
        runs: profiled runs.

    Raises:
        FileError: a file is missing, damaged, incomplete, or ONNX Runtime cannot run it.
        InputError: a number is bad, the inputs do not fit, or the file leaves sizes open and none were given.
    """
    for name, value in (("threads", threads), ("runs", runs)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}", fix="pass a whole number of at least 1")
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    was = None if before is None else _examined(Path(before), example_inputs, threads, runs, block, {})
    known: dict[str, float] = {}
    for layer in () if was is None else was[1]:
        known[layer.name] = known.get(layer.name, 0.0) + layer.ms
    ms, layers = _examined(Path(path), example_inputs, threads, runs, block, known)
    diagnosis = Diagnosis(Path(path), ms, None if was is None else was[0], block, layers, ())
    return dataclasses.replace(diagnosis, advice=tuple(_advice(diagnosis)))


def _examined(
    path: Path, example_inputs: Any, threads: int, runs: int, block: int, known: dict[str, float]
) -> tuple[float, tuple[Layer, ...]]:
    """(milliseconds of a run, its layers by time)."""
    proto = read(path)
    try:
        with silence():
            session = open_session(path, threads)
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        fix = "write it anew with surgeon.export(model, path)"
        raise FileError(
            "ONNX Runtime cannot load the file", where=str(path), why=head(str(error)), fix=fix
        ) from error
    try:
        fed = (
            _made(session)
            if example_inputs is None
            else feeds(normalize(example_inputs), session.get_inputs())
        )
        times = []
        for _ in range(runs + 2):
            start = time.perf_counter()
            session.run(None, fed)
            times.append((time.perf_counter() - start) * 1e3)
    except SurgeonError:
        raise
    except Exception as error:  # the same
        fix = "pass example_inputs=... with one tensor for each input of the file"
        raise InputError(
            "the file does not run on the inputs", where=str(path), why=head(str(error)), fix=fix
        ) from error
    origin = _origins(proto)
    layers = [
        _layer(op, origin.get(op.name), proto, block, known)
        for op in profile(path, fed, runs=runs, threads=threads)
    ]
    return float(np.median(times[2:])), tuple(sorted(layers, key=lambda layer: -layer.ms))


_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64,
          "tensor(int32)": np.int32, "tensor(bool)": np.bool_}  # fmt: skip


def _made(session: Any) -> dict[str, Any]:
    """Inputs of the sizes that the file states; the first dim may be open and is 1 then."""
    made: dict[str, Any] = {}
    for item in session.get_inputs():
        sizes = [1 if i == 0 and not isinstance(size, int) else size for i, size in enumerate(item.shape)]
        if item.type not in _TYPES or not all(isinstance(size, int) for size in sizes):
            what = f"input '{item.name}' of the file has the shape {item.shape} and the type {item.type}"
            raise InputError(
                what, why="sizes are open or the type is not a plain one", fix="pass example_inputs=..."
            )
        values = np.random.default_rng(0).standard_normal(sizes)
        made[item.name] = values.astype(_TYPES[item.type]) if "float" in item.type or "double" in item.type else np.ones(
            sizes, _TYPES[item.type]
        )  # fmt: skip
    return made


def _origins(proto: Any) -> dict[str, Any]:
    """Name of an op that runs -> the node of the file that it comes from: the product, if an activation was
    fused to it.
    """
    made = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, Any] = {}
    for node in proto.graph.node:
        source = made.get(node.input[0]) if node.input else None
        product = (
            source
            if source is not None and source.op_type in _PRODUCTS and node.op_type not in _PRODUCTS
            else node
        )
        found.setdefault(node.name, node)
        for name in node.output:
            found.setdefault(f"{name}_nchwc", product)
    return found


def _layer(op: OpTime, node: Any, proto: Any, block: int, known: dict[str, float]) -> Layer:
    name = op.name if node is None else _path(node)
    macs = _macs(op)
    layer = Layer(name, op.op, op.ms, known.get(name), macs, op.read + op.written)
    if node is None or node.op_type != "Conv":
        return layer
    shape = next((tuple(item.dims) for item in proto.graph.initializer if item.name == node.input[1]), None)
    if shape is None:
        return layer
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    widths = shape[1] * groups, shape[0]
    off = [width % block != 0 and not (index == 0 and width < block) for index, width in enumerate(widths)]
    aligned = (_around(widths[0], block), _around(widths[1], block)) if any(off) else None
    return dataclasses.replace(layer, widths=widths, fast=op.name.endswith("_nchwc"), aligned=aligned)


def _path(node: Any) -> str:
    """The module's path if the file says it, else the node's name."""
    scopes: list[str] = next(
        (ast.literal_eval(item.value) for item in node.metadata_props if item.key == SCOPES), []
    )
    return str(scopes[-2]) if len(scopes) > 1 and scopes[-2] else str(node.name)


def _around(width: int, block: int) -> tuple[int, int]:
    below = width // block * block
    return max(below, block if width > block else width), -(-width // block) * block


def _macs(op: OpTime) -> int:
    if op.op not in _PRODUCTS or len(op.shapes) < 2:
        return 0
    elements = op.written // 4
    return elements * (math.prod(op.shapes[1][1:]) if "Conv" in op.op else op.shapes[0][-1])


def _remarks(layer: Layer) -> str:
    said = []
    if layer.fast is False:
        said.append("off the fast path")
    if layer.aligned is not None:
        (a, b), (c, d) = layer.aligned
        said.append(f"nearest whole blocks {_either(a, b)} -> {_either(c, d)}")
    if layer.before_ms is not None and layer.ms > _SLOWER * layer.before_ms:
        said.append("not faster than before")
    if layer.op in REORDERS:
        said.append("puts channels into blocks or back")
    elif layer.waits:
        said.append("waits for memory")
    return "; ".join(said)


def _either(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} or {high}"


def _advice(found: Diagnosis) -> list[str]:
    """What to change, the cause that takes most of the time first."""
    odd = [layer for layer in found.layers if layer.aligned is not None]
    slow = [layer for layer in odd if layer.fast is False]
    worse = _not_faster(found)
    waits = [layer for layer in found.layers if layer.waits and layer.ms >= _TINY]
    tiny = [layer for layer in found.layers if layer.ms < _TINY]
    started = max(found.ms - sum(layer.ms for layer in found.layers), 0.0) / max(found.ms, 1e-12)
    causes: list[tuple[float, str]] = []
    if odd:
        what = f"{len(odd)} convolutions ({found.share(odd):.0%} of the time) have widths that are no whole blocks"
        what += f", {len(slow)} of them off the fast path" if slow else ", which are padded and computed"
        causes.append((found.share(odd), f"{what}: cut with round_to={found.block}"))
    if worse:
        names = ", ".join(repr(name) for name in worse[:_SHOWN])
        share = found.share([layer for layer in found.layers if layer.name in worse])
        causes.append(
            (
                share,
                f"{len(worse)} layers are not faster than before ({share:.0%}): leave them whole with ignore=[{names}]",
            )
        )
    if found.share(waits) > _MUCH:
        kinds: dict[str, float] = defaultdict(float)
        for layer in waits:
            kinds[layer.op] += layer.ms
        most = ", ".join(sorted(kinds, key=lambda kind: -kinds[kind])[:3])
        text = f"{found.share(waits):.0%} of the time waits for memory (most of it {most}): fewer MACs alone do not help there; "
        causes.append(
            (
                found.share(waits),
                text + "cut the widest activations, or surgeon.quantize(...) to move fewer bytes",
            )
        )
    if found.share(tiny) + started > _MUCH:
        share = found.share(tiny) + started
        text = f"{len(tiny)} ops of less than {_TINY * 1e3:.0f} us and starting them take {share:.0%}: "
        causes.append(
            (share, text + "use a larger batch, fewer layers rather than narrower ones, or CUDA graphs")
        )
    causes.sort(key=lambda cause: -cause[0])
    return [text for _, text in causes] or [
        "nothing stands out: the time is in products on the fast path; cut more of them"
    ]


def _not_faster(found: Diagnosis) -> list[str]:
    """Paths of the layers with products that take as long as before, the slowest first."""
    sums: dict[str, float] = defaultdict(float)
    for layer in found.layers:
        if layer.op in _PRODUCTS and layer.before_ms is not None:
            sums[layer.name] += layer.ms
    before = {layer.name: layer.before_ms for layer in found.layers if layer.before_ms is not None}
    return sorted(
        (name for name, ms in sums.items() if ms > _SLOWER * before[name] and ms >= _TINY),
        key=lambda name: -sums[name],
    )
