"""quantize(file, out, batches) -> a smaller ONNX file and a report of what it costs, by ONNX Runtime's own
tools.

int8 static (QDQ: Jacob et al. 2018; ranges by min-max, entropy or percentile of what the calibration batches
give), int8 dynamic (activations are scaled when the file runs) or fp16. Both files then run on the batches:
the error of the outputs, a score if there is a way to take one, and the error that each layer adds.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from surgeon.capture.inputs import normalize
from surgeon.errors import InputError, QuantizeError, SurgeonError
from surgeon.files import silence
from surgeon.onnx import compare as agree
from surgeon.onnx.compare import Array
from surgeon.onnx.file import INLINE_LIMIT, draft_of, head, open_session, read, size_on_disk
from surgeon.onnx.layer_errors import PRODUCTS, LayerLoss, layer_losses, output_error

METHODS = ("static", "dynamic", "fp16")
RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_DYNAMIC = [
    "MatMul",
    "Gemm",
    "Gather",
    "LSTM",
    "Attention",
    "EmbedLayerNormalization",
]  # no Conv: slower
_ENTROPY_BINS = {"num_bins": 1024, "num_quantized_bins": 128}
_SHOWN = 5
Run = Callable[[Any], list[Array]]


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What was written and what it costs.

    Attributes:
        path: the quantised file.
        method: "static", "dynamic" or "fp16".
        size_before, size_after: bytes on disk, external weights included.
        error: largest over outputs of |quantised - float| / |float| (2-norms over all test batches).
        score_before, score_after: what `evaluate` gave for the float and the quantised file; None without it.
        layers: all products that both files have, the one that adds most error first.
    """

    path: Path
    method: str
    size_before: int
    size_after: int
    error: float
    score_before: float | None
    score_after: float | None
    layers: tuple[LayerLoss, ...]

    def __str__(self) -> str:
        share = self.size_after / self.size_before
        lines = [
            f"{self.path}: {self.size_before:,} -> {self.size_after:,} bytes ({share:.2f}x), outputs differ by {self.error:.1e}"
        ]
        if self.score_before is not None and self.score_after is not None:
            lines.append(f"score {self.score_before:.4f} -> {self.score_after:.4f}")
        lines += [
            f"  {x.name} ({x.op}) adds {x.added:.1e}, {x.error:.1e} in all" for x in self.layers[:_SHOWN]
        ]
        if self.layers:
            lines.append(f"to leave the worst layer as it is: ignore=[{self.layers[0].name!r}]")
        return "\n".join(lines)


def quantize(
    path: Any, out: Any, batches: Iterable[Any], *, method: str = "static", ranges: str = "minmax", per_channel: bool = True,
    ignore: Sequence[str] = (), test_batches: Iterable[Any] | None = None, evaluate: Callable[[Run], float] | None = None,
) -> QuantizeReport:  # fmt: skip
    """Write a quantised copy of an ONNX file and measure what that costs.

    Args:
        path: the float ONNX file, as `surgeon.export` writes it.
        out: the file to write; it appears only if it runs.
        batches: example inputs (a tensor, a tuple or a dict each), real ones: static quantisation takes its
            ranges from them.
        method: "static" (int8 weights and activations), "dynamic" (int8 weights; for models of matrix
            products) or "fp16" (inputs and outputs stay as they are).
        ranges: of static quantisation: "minmax", "entropy" or "percentile".
        per_channel: one scale for each output channel of a weight instead of one for all.
        ignore: names of nodes that stay as they are (the report names the layers that lose most).
        test_batches: what to compare the two files on. None: `batches`.
        evaluate: (run) -> score, where run(inputs) gives a file's outputs as arrays; called once for each
            file.

    Raises:
        FileError: the file is missing, damaged or incomplete, or `out` cannot be written.
        InputError: an option is unknown, there are no batches, or a node in `ignore` does not exist.
        QuantizeError: a batch does not fit the file, nothing can be quantised, or ONNX Runtime cannot
            quantise or run it.
    """
    source, target = Path(path), Path(out)
    proto = read(source)
    given, tests = _checked(proto, batches, test_batches, method, ranges, ignore)
    before = _Runner(source, "the float file")
    calibration = [before.feed(batch, number) for number, batch in enumerate(given)]
    checks = (
        calibration if tests is None else [before.feed(batch, number) for number, batch in enumerate(tests)]
    )
    with draft_of(target) as draft:
        try:
            with silence():
                _WRITERS[method](source, draft, calibration, RANGES[ranges], per_channel, list(ignore))
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime's tools raise whatever comes
            fix = "name the node in ignore=[...], or use another method"
            raise QuantizeError(f"ONNX Runtime cannot quantise this file ({method})", where=str(source), why=head(str(error)),
                                fix=fix) from error  # fmt: skip
        small = read(draft)
        _check_changed(proto, small, source, method)
        _describe(proto, small, draft, method)
        after = _Runner(draft, "the quantised file")
        gap, layers = output_error(before.session, after.session, checks), layer_losses(source, draft, checks)
        scores = (None, None) if evaluate is None else (evaluate(before), evaluate(after))
        sizes = size_on_disk(source, proto), size_on_disk(draft, small)
        del after  # it holds the file open
    return QuantizeReport(target, method, sizes[0], sizes[1], gap, scores[0], scores[1], layers)


def _checked(
    proto: Any,
    batches: Iterable[Any],
    tests: Iterable[Any] | None,
    method: str,
    ranges: str,
    ignore: Sequence[str],
) -> tuple[list[Any], list[Any] | None]:
    for name, value, known in (("method", method, METHODS), ("ranges", ranges, tuple(RANGES))):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}", fix=f"use one of {', '.join(known)}")
    unknown = set(ignore) - {node.name for node in proto.graph.node}
    if unknown:
        near = ", ".join(node.name for node in proto.graph.node if node.op_type in PRODUCTS)
        raise InputError(f"the file has no node {min(unknown)!r}", fix=f"use some of {near[:300]}")
    given = list(batches)
    if not given:
        raise InputError(
            "there are no batches", fix="pass a few real inputs, such as [images[:32], images[32:64]]"
        )
    return given, None if tests is None else list(tests)


class _Runner:
    """A file that runs on inputs."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        try:
            with silence():
                self.session = open_session(path)
        except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
            fix = "write it anew with surgeon.export(model, path)"
            raise QuantizeError(
                f"ONNX Runtime cannot load {what}", where=str(path), why=head(str(error)), fix=fix
            ) from error

    def feed(self, batch: Any, number: int) -> dict[str, Array]:
        """The arrays of a batch, after a run that shows that they fit."""
        try:
            fed = agree.feeds(normalize(batch), self.session.get_inputs())
            self.session.run(None, fed)
        except Exception as error:  # the same, and whatever is wrong with the batch
            why = error.what if isinstance(error, SurgeonError) else head(str(error))
            fix = "pass batches of inputs that the file takes: " + ", ".join(
                f"{item.name} {item.shape} {item.type}" for item in self.session.get_inputs()
            )
            raise QuantizeError(
                f"batch {number} does not fit the file", where=str(self.path), why=why, fix=fix
            ) from error
        return fed

    def __call__(self, batch: Any) -> list[Array]:
        return list(self.session.run(None, agree.feeds(normalize(batch), self.session.get_inputs())))


# -- the methods ---------------------------------------------------------------------------------------------


def _entropy_ranges(ready: Path, reader: Any, folder: Path, large: bool) -> Path:
    """A file of ranges by entropy, for quantize_static.

    Left to itself it counts values in as many bins as there are int8 numbers, which leaves one range to
    choose from: the whole.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    calibrator = create_calibrator(
        ready, [*{*QDQRegistry, *QLinearOpsRegistry}], augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Entropy, use_external_data_format=large, extra_options=_ENTROPY_BINS,
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


def _static(
    source: Path,
    draft: Path,
    feeds: list[dict[str, Array]],
    ranges: str,
    per_channel: bool,
    ignore: list[str],
) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # an untyped base
        def __init__(self) -> None:
            self.left = iter(_even(feeds))

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory(dir=draft.parent.parent, prefix=f".{draft.name}.") as folder:
        ready = Path(folder) / "ready.onnx"
        large = size_on_disk(source) > INLINE_LIMIT
        quant_pre_process(
            str(source),
            str(ready),
            skip_optimization=True,
            skip_symbolic_shape=True,
            save_as_external_data=large,
        )
        known = (
            {"calibration_cache_path": _entropy_ranges(ready, Reader(), Path(folder), large)}
            if ranges == "Entropy"
            else {}
        )
        quantize_static(
            str(ready), str(draft), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel, nodes_to_exclude=ignore,
            calibrate_method=CalibrationMethod[ranges], use_external_data_format=large, **known,
        )  # fmt: skip


def _dynamic(
    source: Path,
    draft: Path,
    feeds: list[dict[str, Array]],
    ranges: str,
    per_channel: bool,
    ignore: list[str],
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    large = size_on_disk(source) > INLINE_LIMIT
    proto = read(source, weights=True)
    del proto.graph.value_info[:]  # the tool transposes weights and then trips over their old shapes
    quantize_dynamic(
        proto, str(draft), op_types_to_quantize=_DYNAMIC, per_channel=per_channel, nodes_to_exclude=ignore,
        use_external_data_format=large,
    )  # fmt: skip


def _fp16(
    source: Path,
    draft: Path,
    feeds: list[dict[str, Array]],
    ranges: str,
    per_channel: bool,
    ignore: list[str],
) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(
        read(source, weights=True), keep_io_types=True, node_block_list=ignore or None
    )
    onnx.save(
        half, str(draft), save_as_external_data=half.ByteSize() > INLINE_LIMIT, location=f"{draft.name}.data"
    )


_WRITERS: dict[str, Callable[..., None]] = {"static": _static, "dynamic": _dynamic, "fp16": _fp16}


def _check_changed(proto: Any, small: Any, source: Path, method: str) -> None:
    """Refuse a file in which nothing was quantised."""
    types = [sorted({item.data_type for item in p.graph.initializer}) for p in (proto, small)]
    if types[0] == types[1]:
        why = "it has no layer that this method knows" + (" (matrix products)" if method == "dynamic" else "")
        raise QuantizeError(
            "nothing was quantised",
            where=str(source),
            why=why,
            fix='try method="static", or fewer names in ignore',
        )


def _describe(proto: Any, small: Any, draft: Path, method: str) -> None:
    """The float file's metadata, and how it was quantised."""
    facts = {item.key: item.value for item in proto.metadata_props} | {"surgeon.quantized": method}
    del small.metadata_props[:], small.graph.value_info[:]  # shapes are inferred when it is loaded
    for key, value in facts.items():
        small.metadata_props.add(key=key, value=value)
    draft.write_bytes(small.SerializeToString())
