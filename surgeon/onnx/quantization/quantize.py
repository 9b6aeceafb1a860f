"""quantize(file, out, batches) -> a smaller ONNX file and a report of what it costs, by ONNX Runtime's own
tools.

int8 static (QDQ: Jacob et al. 2018; ranges by min-max, entropy or percentile of what the calibration batches
give), int8 dynamic (activations are scaled when the file runs) or fp16. Both files then run on the batches:
the error of the outputs, a score if there is a way to take one, and the error that each layer adds. These runs
compute exact int8 products, so that the numbers are the same on every CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.capture.inputs import normalize
from surgeon.errors import FileError, InputError, QuantizeError, SurgeonError
from surgeon.files import silence
from surgeon.graph.given import PATH, check_given
from surgeon.onnx import compare as agree
from surgeon.onnx.child_process import run_in_child
from surgeon.onnx.compare import Array
from surgeon.onnx.file import draft_of, head, name_by_content, open_session, read, size_on_disk
from surgeon.onnx.quantization import saturation
from surgeon.onnx.quantization.float_nodes import check_scales
from surgeon.onnx.quantization.layer_errors import PRODUCTS, LayerLoss, layer_losses, output_error
from surgeon.onnx.quantization.methods import METHODS, RANGES, WRITERS, Request

_SHOWN = 5
_SEVEN_BITS = "weights take 7 bits, which no CPU saturates on; reduce_range=False gives 8, for CPUs with VNNI, ARM and NPUs"
_SATURATES = "int8 products saturate on this CPU (x86 without VNNI): the numbers hold on others; for this one: reduce_range=True"
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
        weight_bits: of the quantised weights: 8, 7 (`reduce_range`), or 16 (fp16).
        saturates: the CPU that ran this adds int8 products in 16 bits, and the weights take all 8: here ONNX
            Runtime gives other outputs than those that were compared.
    """

    path: Path
    method: str
    size_before: int
    size_after: int
    error: float
    score_before: float | None
    score_after: float | None
    layers: tuple[LayerLoss, ...]
    weight_bits: int
    saturates: bool

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
        if self.weight_bits == 7:
            lines.append(_SEVEN_BITS)
        if self.saturates:
            lines.append(_SATURATES)
        if self.layers:
            lines.append(f"to leave the worst layer as it is: ignore=[{self.layers[0].name!r}]")
        return "\n".join(lines)


_FILE = dataclasses.replace(
    PATH, how="pass the path of an ONNX file: surgeon.export(model, path, x) writes one of a model"
)


def quantize(
    path: Any, out: Any, batches: Iterable[Any], *, method: str = "static", ranges: str = "minmax", per_channel: bool = True,
    reduce_range: bool | None = None, ignore: Sequence[str] = (), test_batches: Iterable[Any] | None = None,
    evaluate: Callable[[Run], float] | None = None,
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
        reduce_range: int8 weights take 7 of the 8 bits. x86 CPUs without VNNI (AVX2 and older AVX-512) saturate
            on sums of larger products, which costs accuracy there and nowhere else. None: if this CPU does.
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
    check_given("surgeon.quantize(path, out, batches)", path=(path, _FILE), out=(out, PATH))
    source, target = Path(path), Path(out)
    proto = read(source)
    if os.path.exists(target) and target.samefile(source):
        raise InputError(
            "the quantised file would replace the float one", where=str(target), fix="choose another name"
        )
    given, tests = _checked(proto, batches, test_batches, method, ranges, ignore)
    request = _request(method, ranges, per_channel, reduce_range, ignore)
    before = _Runner(source, "the float file")
    calibration = [before.feed(batch, number) for number, batch in enumerate(given)]
    checks = (
        calibration if tests is None else [before.feed(batch, number) for number, batch in enumerate(tests)]
    )
    with draft_of(target) as draft:
        try:
            with silence():
                WRITERS[method](source, draft, calibration, request)
        except OSError:
            raise
        except Exception as error:  # ONNX Runtime's tools raise whatever comes
            fix = "name the node in ignore=[...], or use another method"
            raise QuantizeError(f"ONNX Runtime cannot quantise this file ({method})", where=str(source), why=head(str(error)),
                                fix=fix) from error  # fmt: skip
        small = read(draft)
        check_scales(small)
        _check_changed(proto, small, source, method)
        _describe(proto, small, draft, method)
        _check_runs(draft, checks[0], source)
        after = _Runner(draft, "the quantised file")
        gap, layers = output_error(before.session, after.session, checks), layer_losses(source, draft, checks)
        if not math.isfinite(gap):
            raise _no_number(before, checks, layers, method, source)
        scores = (None, None) if evaluate is None else (evaluate(before), evaluate(after))
        del after  # it holds the file open
        name_by_content(draft)
        sizes = size_on_disk(source, proto), size_on_disk(draft)
    bits = 16 if method == "fp16" else 8 - request.reduce_range
    saturates = bits == 8 and saturation.products_saturate()
    return QuantizeReport(
        target, method, sizes[0], sizes[1], gap, scores[0], scores[1], layers, bits, saturates
    )


def _request(
    method: str, ranges: str, per_channel: bool, reduce_range: bool | None, ignore: Sequence[str]
) -> Request:
    if method == "fp16" and reduce_range is not None:
        raise InputError(
            "fp16 has no weights of 7 bits", fix='leave out reduce_range, or pass method="static"'
        )
    reduced = method != "fp16" and (saturation.products_saturate() if reduce_range is None else reduce_range)
    return Request(ranges, per_channel, reduced, tuple(ignore))


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
                self.session = open_session(path, exact=saturation.products_saturate())
        except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
            fix = "write it anew with surgeon.export(model, path)"
            raise QuantizeError(
                f"ONNX Runtime cannot load {what}", where=str(path), why=head(str(error)), fix=fix
            ) from error

    def feed(self, batch: Any, number: int) -> dict[str, Array]:
        """The arrays of a batch, after a run that shows that they fit."""
        try:
            fed = agree.feeds(normalize(batch, "it"), self.session.get_inputs())
            self.session.run(None, fed)
        except Exception as error:  # the same, and whatever is wrong with the batch
            why = error.what if isinstance(error, SurgeonError) else head(str(error))
            fix = "pass batches of inputs that the file takes, as tensors: " + ", ".join(
                f"{item.name} {item.shape} {item.type}" for item in self.session.get_inputs()
            )
            raise QuantizeError(
                f"batch {number} does not fit the file", where=str(self.path), why=why, fix=fix
            ) from error
        return fed

    def __call__(self, batch: Any) -> list[Array]:
        return list(self.session.run(None, agree.feeds(normalize(batch), self.session.get_inputs())))


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


def _check_runs(draft: Path, fed: dict[str, Array], source: Path) -> None:
    """Refuse a file that ONNX Runtime cannot run; tried in a child, which it may end."""
    try:
        run_in_child(draft, [fed], exact=saturation.products_saturate())
    except FileError as error:
        where = error.where.replace(str(draft), str(source))
        fix = "use another method, or keep the float file; ignore=[...] helps if the node alone is to blame"
        raise QuantizeError(
            "ONNX Runtime cannot run the quantised file", where=where, why=error.why, fix=fix
        ) from error


def _no_number(
    before: _Runner, checks: list[dict[str, Array]], layers: Sequence[LayerLoss], method: str, source: Path
) -> QuantizeError:
    """What to raise where an output of one of the two files is infinite or no number, and that of the other is not."""
    outputs = itertools.chain.from_iterable(before.session.run(None, fed) for fed in checks)
    if any(np.isnan(np.asarray(output, np.float64)).any() for output in outputs):
        return QuantizeError(
            "the float file gives NaN on these inputs, so that nothing can be compared", where=str(source),
            fix="pass inputs on which it gives numbers",
        )  # fmt: skip
    guilty = [
        layer.name or f"a {layer.op} without a name" for layer in layers if not math.isfinite(layer.error)
    ]
    return QuantizeError(
        f"the quantised file ({method}) gives no finite numbers where the float one does", where=str(source),
        why=f"first at {guilty[0]}" if guilty else "numbers overflow",
        fix="leave those nodes as they are, ignore=[...], or use another method",
    )  # fmt: skip


def _describe(proto: Any, small: Any, draft: Path, method: str) -> None:
    """The float file's metadata, and how it was quantised."""
    facts = {item.key: item.value for item in proto.metadata_props} | {"surgeon.quantized": method}
    del small.metadata_props[:], small.graph.value_info[:]  # shapes are inferred when it is loaded
    for key, value in facts.items():
        small.metadata_props.add(key=key, value=value)
    draft.write_bytes(small.SerializeToString())
