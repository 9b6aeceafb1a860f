"""doctor(file) -> why an ONNX file is not faster on the CPU, op by op, with advice that can be pasted.

The times are ONNX Runtime's own, of the graph that really runs after its fusions. A convolution is on the
fast path if it ran on blocks of channels (NCHWc: 8 wide, 16 with AVX-512); widths that are no multiple of the
block keep it off, or are padded to one and the padding is computed. An op that does few multiply-accumulates
for each byte that it moves waits for memory, and fewer channels help it only as far as they are fewer bytes;
ops of a few microseconds cost what starting them costs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.capture.inputs import normalize
from surgeon.errors import FileError, InputError, SurgeonError
from surgeon.files import silence
from surgeon.graph.given import PATH, check_given
from surgeon.onnx.compare import feeds
from surgeon.onnx.file import SCOPES, head, open_session, read
from surgeon.timing.advice import PRODUCTS, advice_on
from surgeon.timing.diagnosis import Diagnosis, Layer
from surgeon.timing.ort_profile import OpTime, profile


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
    check_given("surgeon.doctor(path)", path=(path, PATH))
    if before is not None:
        check_given("surgeon.doctor(path, before)", before=(before, PATH))
    for name, value in (("threads", threads), ("runs", runs)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[name]:
            raise InputError(f"{name} is {value!r}", fix=f"pass a whole number from 1 to {_MOST[name]}")
    if before is not None:
        _check_alike(Path(before), Path(path))
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    was = None if before is None else _examined(Path(before), example_inputs, threads, runs, block, {})
    known: dict[str, float] = {}
    for layer in () if was is None else was[1]:
        known[layer.name] = known.get(layer.name, 0.0) + layer.ms
    ms, layers = _examined(Path(path), example_inputs, threads, runs, block, known)
    diagnosis = Diagnosis(Path(path), ms, None if was is None else was[0], block, layers, ())
    return dataclasses.replace(diagnosis, advice=tuple(advice_on(diagnosis)))


def _check_alike(before: Path, after: Path) -> None:
    """Refuse to compare the times of models that take other inputs.

    Raises:
        InputError: an input has another fixed size in one of the files.
    """
    was, now = ({item.name: _sizes(item) for item in read(path).graph.input} for path in (before, after))
    for name in was.keys() & now.keys():
        a, b = was[name], now[name]
        if len(a) != len(b) or any(x != y for x, y in zip(a, b, strict=True) if x and y):
            raise InputError(
                f"input '{name}' is {a} in the one file and {b} in the other (0: open)", where=f"{before}, {after}",
                why="times of inputs of other sizes say nothing about the cut", fix="export both with the same inputs",
            )  # fmt: skip


def _sizes(item: Any) -> list[int]:
    return [dim.dim_value for dim in item.type.tensor_type.shape.dim]


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
    except Exception as error:  # ONNX Runtime's classes as well, and whatever is wrong with the inputs
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


_MOST = {"threads": 1024, "runs": 100_000}
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
            if source is not None and source.op_type in PRODUCTS and node.op_type not in PRODUCTS
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
    said = next((item.value for item in node.metadata_props if item.key == SCOPES), "")
    scopes = (
        [name[1:-1] for name in re.findall(_QUOTED, said)] if re.fullmatch(_LIST, said[:_LONGEST]) else []
    )
    return scopes[-2] if len(scopes) > 1 and scopes[-2] else str(node.name)


_QUOTED = r"'[^'\\]*'|\"[^\"\\]*\""
_LIST = rf"\[(({_QUOTED})(, ({_QUOTED}))*)?\]"  # of texts, as Python prints one
_LONGEST = 1 << 16


def _around(width: int, block: int) -> tuple[int, int]:
    below = width // block * block
    return max(below, block if width > block else width), -(-width // block) * block


def _macs(op: OpTime) -> int:
    if op.op not in PRODUCTS or len(op.shapes) < 2:
        return 0
    elements = op.written // 4
    return elements * (math.prod(op.shapes[1][1:]) if "Conv" in op.op else op.shapes[0][-1])
