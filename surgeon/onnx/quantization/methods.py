"""What writes a quantised ONNX file: int8 with ranges from data (static), int8 of weights alone (dynamic), fp16,
each by ONNX Runtime's own tools.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgeon.onnx.compare import Array
from surgeon.onnx.file import INLINE_LIMIT, read, save, size_on_disk
from surgeon.onnx.quantization.float_nodes import (
    float_nodes,
    per_tensor_weights,
    with_finite_constants,
    with_names,
)

METHODS = ("static", "dynamic", "fp16")
RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_DYNAMIC = ["MatMul", "Gemm", "Gather", "LSTM", "Attention", "EmbedLayerNormalization"]  # no Conv: slower
_RECURRENT = ["LSTM", "GRU", "RNN"]  # stay float32 in an fp16 file: the CPU has no kernels for them, and ends
_ENTROPY_BINS = {"num_bins": 1024, "num_quantized_bins": 128}


@dataclasses.dataclass(frozen=True)
class Request:
    """How a file is to be quantised.

    Attributes:
        ranges: a key of `RANGES`.
        per_channel: one scale for each output channel of a weight instead of one for all.
        reduce_range: weights take 7 of the 8 bits.
        ignore: names of nodes that stay as they are.
    """

    ranges: str
    per_channel: bool
    reduce_range: bool
    ignore: tuple[str, ...]


def _histogram_ranges(ready: Path, reader: Any, folder: Path, large: bool, ranges: str) -> Path:
    """A file of ranges by entropy or percentile, for quantize_static.

    Left to itself, entropy counts values in as many bins as there are int8 numbers, which leaves one range to
    choose from: the whole. And histograms take no infinity: masks are finite here (their sums stay float).
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    finite = folder / "finite.onnx"
    save(with_finite_constants(read(ready, weights=True)), finite)
    calibrator = create_calibrator(
        finite, [*{*QDQRegistry, *QLinearOpsRegistry}], augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod[RANGES[ranges]], use_external_data_format=large,
        extra_options=_ENTROPY_BINS if ranges == "entropy" else {},
    )  # fmt: skip
    calibrator.collect_data(reader)
    save_tensors_data(calibrator.compute_data(), folder / "ranges.json")
    return folder / "ranges.json"


def _even(feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """The same rows in batches of one size: the histograms of ONNX Runtime take no other."""
    rows = [next(iter(fed.values())).shape[0] for fed in feeds if all(array.ndim for array in fed.values())]
    size = math.gcd(*rows) if len(rows) == len(feeds) else 0
    if (
        len(set(rows)) < 2
        or not size
        or any(len(a) != n for fed, n in zip(feeds, rows, strict=True) for a in fed.values())
    ):
        return feeds
    return [
        {name: array[start : start + size] for name, array in fed.items()}
        for fed, count in zip(feeds, rows, strict=True)
        for start in range(0, count, size)
    ]


def _static(source: Path, draft: Path, feeds: list[dict[str, Array]], request: Request) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # an untyped base
        def __init__(self) -> None:
            self.left = iter(_even(feeds))

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        named, ready = Path(folder) / "named.onnx", Path(folder) / "ready.onnx"
        large = size_on_disk(source) > INLINE_LIMIT
        proto = with_names(read(source, weights=True))
        save(proto, named)
        quant_pre_process(
            str(named),
            str(ready),
            skip_optimization=True,
            skip_symbolic_shape=True,
            save_as_external_data=large,
        )
        known = (
            {
                "calibration_cache_path": _histogram_ranges(
                    ready, Reader(), Path(folder), large, request.ranges
                )
            }
            if request.ranges != "minmax"
            else {}
        )
        one_scale = {name: [{"quant_type": QuantType.QInt8}] for name in per_tensor_weights(proto)}
        quantize_static(
            str(ready), str(draft), Reader(), quant_format=QuantFormat.QDQ, per_channel=request.per_channel,
            reduce_range=request.reduce_range, nodes_to_exclude=[*request.ignore, *float_nodes(proto)],
            calibrate_method=CalibrationMethod[RANGES[request.ranges]], use_external_data_format=large,
            extra_options={"TensorQuantOverrides": one_scale} if one_scale else {}, **known,
        )  # fmt: skip


def _dynamic(source: Path, draft: Path, feeds: list[dict[str, Array]], request: Request) -> None:
    from onnxruntime.quantization import quantize_dynamic

    large = size_on_disk(source) > INLINE_LIMIT
    proto = read(source, weights=True)
    del proto.graph.value_info[:]  # the tool transposes weights and then trips over their old shapes
    quantize_dynamic(
        proto, str(draft), op_types_to_quantize=_DYNAMIC, per_channel=request.per_channel,
        reduce_range=request.reduce_range, nodes_to_exclude=list(request.ignore), use_external_data_format=large,
    )  # fmt: skip


def _fp16(source: Path, draft: Path, feeds: list[dict[str, Array]], request: Request) -> None:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    half = convert_float_to_float16(
        read(source, weights=True), keep_io_types=True, node_block_list=list(request.ignore) or None,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_RECURRENT],
    )  # fmt: skip
    once = {
        node.SerializeToString(): node for node in half.graph.node
    }  # a value that a node reads twice is cast twice
    nodes = [type(node).FromString(text) for text, node in once.items()]
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    save(half, draft)


WRITERS: dict[str, Callable[..., None]] = {"static": _static, "dynamic": _dynamic, "fp16": _fp16}
