"""Predict what a choice costs in milliseconds, from a table of measured kernels; and measure what was chosen.

The graph says which products (convolutions, matrix products, attention) a choice leaves, with their shapes. Each distinct one is
timed on the target at a few widths, and a surface a + b * in + c * out + d * in * out through these points predicts the rest. All
other ops together take what the whole model takes beyond its products, in proportion to the bytes that they write. The table is
kept on disk by runtime, version, processor, threads, op and shapes, so that it is measured once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from surgeon.bench import bench, cpu_name
from surgeon.cost import MACS, Choice, Shapes, nothing
from surgeon.errors import BudgetError, InputError
from surgeon.export import export
from surgeon.fuse import fuse
from surgeon.graph import spec
from surgeon.labels import Track
from surgeon.plan import write_atomically
from surgeon.rules.registry import Family, family, op_name

RUNTIMES = ("onnxruntime", "torch")
_REPEATS = 12  # timed runs of a kernel, after two that are not timed
_SHARES = (1.0, 0.5, 0.25)  # of each width: where a kernel is timed
_TOGETHER = 24  # kernels timed in one session
_CLOSE = 0.03  # below the limit: close enough
_CANDIDATES = 8  # measured for one latency
_ROUNDS = 24  # interleaved runs of two whole models


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One product as a runtime sees it.

    Attributes:
        kind: "conv", "conv_transpose" or "matmul".
        x, w: shapes of the data and the weight; for matmul [..., M, K] and [..., K, N].
        stride, padding, dilation: of convolutions.
        groups: of convolutions.
    """

    kind: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) channels."""
        if self.kind == "matmul":
            return self.w[-2], self.w[-1]
        own, other = (1, 0) if self.kind == "conv" else (0, 1)
        return self.w[own] * (self.groups if self.kind == "conv" else 1), self.w[other] * (
            1 if self.kind == "conv" else self.groups
        )

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    def at(self, share_in: float, share_out: float, block: int) -> Kernel:
        """The same kernel with fewer channels, in whole blocks where it has one."""
        into, out = self.widths
        new_in, new_out = _part(into, share_in, block), _part(out, share_out, block)
        if self.kind == "matmul":
            return dataclasses.replace(self, x=(*self.x[:-1], new_in), w=(*self.w[:-2], new_in, new_out))
        if self.groups > 1:  # what a group holds stays; there are fewer groups
            groups = max(1, round(self.groups * new_in / into))
            per_in, per_out = into // self.groups, out // self.groups
            new_in, new_out = groups * per_in, groups * per_out
            w = (new_out, per_in) if self.kind == "conv" else (new_in, per_out)
            return dataclasses.replace(self, x=(self.x[0], new_in, *self.x[2:]), w=(*w, *self.w[2:]), groups=groups)
        w = (new_out, new_in) if self.kind == "conv" else (new_in, new_out)
        return dataclasses.replace(self, x=(self.x[0], new_in, *self.x[2:]), w=(*w, *self.w[2:]))


def _part(width: int, share: float, block: int) -> int:
    return width if share == 1 else max(min(width, block), round(width * share / block) * block)


def kernels(shapes: Shapes, choice: Choice) -> list[list[Kernel]]:
    """The kernels of every product of the graph, in order: two for a fused attention."""
    return [_kernels(shapes, node, choice) for node in shapes.products]


def _kernels(shapes: Shapes, node: fx.Node, choice: Choice) -> list[Kernel]:
    name = op_name(node)
    given: list[Any] = [shapes.shape(a, choice) if isinstance(a, fx.Node) else a for a in node.args]
    if name in ("convolution", "_convolution"):
        x, w, stride, padding, dilation, transposed = given[0], given[1], given[3], given[4], given[5], bool(given[6])
        groups = max(1, x[1] // w[1]) if not transposed else max(1, shapes.shape(node, choice)[1] // w[1])
        options = (tuple(stride), tuple(padding), tuple(dilation), groups)
        return [Kernel("conv_transpose" if transposed else "conv", tuple(x), tuple(w), *options)]
    if name.startswith("_scaled_dot_product"):
        q, k, v = given[:3]
        scores = (*q[:3], k[2])
        return [Kernel("matmul", tuple(q), (*k[:2], k[3], k[2])), Kernel("matmul", scores, tuple(v))]
    if name == "linear":
        return [Kernel("matmul", (int(np.prod(given[0][:-1])), given[0][-1]), (given[1][1], given[1][0]))]
    left, right = given[1:3] if name in ("addmm", "baddbmm", "addbmm", "addmv") else given[:2]
    if len(left) == 1 or len(right) == 1:  # vectors
        left, right = (1, *left) if len(left) == 1 else left, (*right, 1) if len(right) == 1 else right
    return [Kernel("matmul", tuple(left), tuple(right))]


# -- timing one kernel ----------------------------------------------------------------------------------------------------


def time_by_onnxruntime(todo: Sequence[Kernel], threads: int) -> list[float]:
    """Milliseconds of each kernel alone, by ONNX Runtime's own profile: reordering of what goes in and out is not counted."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, inputs, weights, outputs = [], [], [], []
    for number, kernel in enumerate(todo):
        data = generator.standard_normal(kernel.w, dtype=np.float32) * 0.1
        inputs.append(helper.make_tensor_value_info(f"x{number}", onnx.TensorProto.FLOAT, kernel.x))
        outputs.append(helper.make_tensor_value_info(f"k{number}", onnx.TensorProto.FLOAT, None))
        weights.append(numpy_helper.from_array(data, f"w{number}"))
        names = ([f"x{number}", f"w{number}"], [f"k{number}"])
        if kernel.kind == "matmul":
            nodes.append(helper.make_node("MatMul", *names, name=f"k{number}"))
            continue
        options: dict[str, Any] = {
            "strides": kernel.stride,
            "pads": kernel.padding * 2,
            "dilations": kernel.dilation,
            "group": kernel.groups,
        }
        op = "Conv" if kernel.kind == "conv" else "ConvTranspose"
        nodes.append(helper.make_node(op, *names, name=f"k{number}", **options))
    model = helper.make_model(
        helper.make_graph(nodes, "kernels", inputs, outputs, weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    fed = {f"x{number}": generator.standard_normal(kernel.x, dtype=np.float32) for number, kernel in enumerate(todo)}
    with tempfile.TemporaryDirectory() as folder:
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads, session_options.enable_profiling = threads, True
        session_options.profile_file_prefix = os.path.join(folder, "profile")
        session_options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
        for _ in range(_REPEATS + 2):
            session.run(None, fed)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[int, list[float]] = {number: [] for number in range(len(todo))}
    for event in events:
        label = event.get("name", "")
        if event.get("cat") == "Node" and label.startswith("k") and label.endswith("_kernel_time"):
            times[int(label[1:].split("_")[0])].append(event["dur"] / 1e3)
    return [float(np.median(times[number][2:])) for number in range(len(todo))]


def time_by_torch(todo: Sequence[Kernel], threads: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Milliseconds of each kernel alone in eager torch; on CUDA by events."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [_torch_time(kernel, device, dtype) for kernel in todo]
    finally:
        torch.set_num_threads(before)


def _torch_time(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    x, w = (torch.randn(shape, device=device, dtype=dtype) for shape in (kernel.x, kernel.w))
    options = (
        None,
        kernel.stride,
        kernel.padding,
        kernel.dilation,
        kernel.kind != "conv",
        [0] * len(kernel.stride),
        kernel.groups,
    )

    def run() -> Tensor:
        return x @ w if kernel.kind == "matmul" else torch.convolution(x, w, *options)

    times = []
    with torch.inference_mode():
        for _ in range(_REPEATS + 2):
            if device.type == "cuda":
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop))
            else:
                begun = time.perf_counter()
                run()
                times.append((time.perf_counter() - begun) * 1e3)
    return float(np.median(times[2:]))


# -- the table ------------------------------------------------------------------------------------------------------------


class LatencyTable:
    """Measured milliseconds by kernel, kept on disk.

    Args:
        runtime: "onnxruntime" (on the CPU) or "torch" (eager, where the weights are).
        threads: intra-op threads.
        device, dtype: of the weights, for torch.
        path: the file; by default `latency.json` in $SURGEON_CACHE or ~/.cache/surgeon.
        timer: (kernels) -> milliseconds, instead of the runtime's.
    """

    def __init__(
        self,
        runtime: str = "onnxruntime",
        threads: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        timer: Callable[[Sequence[Kernel]], list[float]] | None = None,
    ) -> None:
        if runtime not in RUNTIMES:
            raise InputError(f"unknown runtime {runtime!r}", fix=f"use one of {', '.join(RUNTIMES)}")
        self.runtime, self.threads = runtime, threads
        self.device, self.dtype = device or torch.device("cpu"), dtype
        folder = Path(os.environ.get("SURGEON_CACHE") or Path.home() / ".cache" / "surgeon")
        self.path = Path(path) if path is not None else folder / "latency.json"
        self._timer = timer
        self.measured = 0  # kernels that were timed, not found

    @cached_property
    def target(self) -> str:
        """What the times hold for."""
        if self.runtime == "onnxruntime":
            import onnxruntime

            version = onnxruntime.__version__
        else:
            version = torch.__version__
        place = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        kind = "" if self.runtime == "onnxruntime" else f", {self.dtype}"
        return f"{self.runtime} {version}, {place}, {self.threads} threads{kind}"

    @cached_property
    def known(self) -> dict[str, float]:
        return dict(self._file().get(self.target, {}))

    def _file(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):  # none yet, or a damaged one: it is only a cache
            return {}
        return found if isinstance(found, dict) else {}

    def times(self, wanted: Iterable[Kernel]) -> None:
        """Time what the table does not hold yet, and keep it."""
        todo = [kernel for kernel in dict.fromkeys(wanted) if kernel.key not in self.known]
        for first in range(0, len(todo), _TOGETHER):
            some = todo[first : first + _TOGETHER]
            self.known.update(zip((kernel.key for kernel in some), self._time(some), strict=True))
            self.measured += len(some)
        if todo:
            everything = self._file()
            everything[self.target] = {**everything.get(self.target, {}), **self.known}
            write_atomically(self.path, json.dumps(everything, indent=0).encode())

    def _time(self, todo: Sequence[Kernel]) -> list[float]:
        if self._timer is not None:
            return self._timer(todo)
        if self.runtime == "onnxruntime":
            return time_by_onnxruntime(todo, self.threads)
        return time_by_torch(todo, self.threads, self.device, self.dtype)


class Predictor:
    """Milliseconds of a choice, before anything is cut.

    Args:
        total: measured milliseconds of the whole original.
        block: widths at which kernels are timed are multiples of it.
    """

    def __init__(self, shapes: Shapes, table: LatencyTable, total: float, block: int) -> None:
        self.shapes, self.table, self.total = shapes, table, total
        whole = nothing(shapes.solution)
        self._original = kernels(shapes, whole)
        self._points = {k: [k.at(a, b, block) for a in _SHARES for b in _SHARES] for own in self._original for k in own}
        table.times(kernel for points in self._points.values() for kernel in points)
        self._surfaces = {kernel: self._surface(points) for kernel, points in self._points.items()}
        names = ((node, op_name(node)) for node in shapes.graph.fx.nodes if node.op == "call_function")
        self._others = [n for n, name in names if name not in MACS and family(name) in (Family.ELEMENTWISE, Family.REDUCTION)]
        self._known: dict[bytes, float] = {}
        self._rest_bytes = self._written(whole)
        products = self._products(whole)
        self.rest = max(total - products, 0.0)
        self.scale = total / (products + self.rest)
        self.correction = 1.0

    def __call__(self, choice: Choice) -> float:
        key = choice.tobytes()
        if key not in self._known:
            rest = self.rest * self._written(choice) / max(self._rest_bytes, 1)
            self._known[key] = self.scale * (self._products(choice) + rest)
        return self.correction * self._known[key]

    def _products(self, choice: Choice) -> float:
        total = 0.0
        for now, before in zip(kernels(self.shapes, choice), self._original, strict=True):
            for small, full in zip(now, before, strict=True):
                found = float(_features(small) @ self._surfaces[full])
                least = 0.02 * float(_features(full) @ self._surfaces[full])
                total += max(found, least)
        return total

    def _surface(self, points: Sequence[Kernel]) -> Track:
        """Least squares of relative errors, with coefficients that are not negative."""
        rows = np.stack([_features(kernel) for kernel in points])
        times = np.array([max(self.table.known[kernel.key], 1e-4) for kernel in points])
        left, right = rows / times[:, None], np.ones(len(points))
        scale = np.abs(left).max(axis=0)
        surface: Track = _nonnegative(left / scale, right) / scale
        return surface

    def _written(self, choice: Choice) -> float:
        """Bytes that all other ops write."""
        return float(sum(math.prod(self.shapes.shape(n, choice)) * spec(n).dtype.itemsize for n in self._others))


def _features(kernel: Kernel) -> Track:
    into, out = kernel.widths
    found: Track = np.array([1.0, into, out, into * out / kernel.groups])
    return found


def _nonnegative(rows: Track, want: Track) -> Track:
    """Least squares with coefficients >= 0: the worst negative one is left out until there is none."""
    active = list(range(rows.shape[1]))
    while True:
        found = np.zeros(rows.shape[1])
        found[active] = np.linalg.lstsq(rows[:, active], want, rcond=None)[0]
        if found.min() >= 0 or len(active) == 1:
            clipped: Track = np.maximum(found, 0.0)
            return clipped
        active.remove(int(np.argmin(found)))


# -- the search -----------------------------------------------------------------------------------------------------------


def search(
    chosen: Callable[[], Choice],
    predict: Predictor,
    measure: Callable[[Choice], tuple[float, float, tuple[float, float]]],
    limit_of: Callable[[float], float],
) -> tuple[Choice, dict[str, Any]]:
    """Choose, measure, correct the prediction, and choose again, until what is measured is just below the limit.

    Args:
        chosen: the choice within the budgets, by the prediction as it stands.
        measure: (ms of the original, ms of the small model, 95 % interval of their quotient) of a choice.
        limit_of: the limit in ms, given the original's.

    Returns:
        The choice that was measured closest below the limit, and its figures.

    Raises:
        BudgetError: every candidate was measured above the limit, down to the smallest one.
    """
    best: tuple[float, Choice, dict[str, Any]] | None = None
    nearest = math.inf
    for tried in range(1, _CANDIDATES + 1):
        try:
            choice = chosen()
        except BudgetError:
            if best is not None:
                break
            if tried == 1 or nearest is math.inf:
                raise
            raise BudgetError(
                f"no candidate reaches the latency: {nearest:.3g} times the limit was the nearest that was measured",
                why="parts that must stay take longer than the budget allows",
                fix="ask for more time, or see which layers are frozen: print(surgeon.inspect(model))",
            ) from None
        before, after, interval = measure(choice)
        share = after / limit_of(before)
        nearest = min(nearest, share)
        said = {"original_ms": before, "ms": after, "interval": interval, "limit_ms": limit_of(before), "candidates": tried}
        if share <= 1 and (best is None or share > best[0]):
            best = share, choice, said
        if 1 - _CLOSE <= share <= 1:
            break
        aim = 1 - _CLOSE / 2  # the middle of what is close enough
        predict.correction *= share / aim / (predict(choice) / limit_of(predict.total))
    if best is None:
        raise BudgetError(
            f"no candidate of {_CANDIDATES} reaches the latency: {nearest:.3g} times the limit was the nearest that was measured",
            why="the machine is too noisy, or what must stay takes too long",
            fix="ask for more time, or try again on a quiet machine",
        )
    if best[0] < 1 - _CLOSE:
        warnings.warn(f"the latency is {best[0]:.1%} of the limit: no candidate was measured closer below it", stacklevel=3)
    return best[1], best[2]


# -- whole models ---------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Measures whole models in turns with the original, as they would be deployed.

    For ONNX Runtime both are fused and exported; for torch both run eagerly as they are.
    """

    def __init__(self, model: nn.Module, inputs: Any, runtime: str, threads: int, folder: str) -> None:
        self.inputs, self.runtime, self.threads, self.folder = inputs, runtime, threads, Path(folder)
        self.original = self._deployed(model, "original")
        self.count = 0

    def _deployed(self, model: nn.Module, name: str) -> nn.Module | Path:
        if self.runtime == "torch":
            return model
        path = self.folder / f"{name}.onnx"
        export(fuse(model), path, self.inputs, dynamic_batch=False)
        return path

    def measure(self, small: nn.Module | None = None) -> tuple[float, float, tuple[float, float]]:
        """(milliseconds of the original, of the small model, 95 % interval of small / original), medians of interleaved runs."""
        self.count += 1
        models: dict[str, Any] = {"original": self.original}
        models["small"] = self.original if small is None else self._deployed(small, f"small-{self.count}")
        clock = "cpu" if self.threads == 1 else "wall"  # with one thread the same, but for what else runs on the machine
        table = bench(models, self.inputs, threads=self.threads, repeats=_ROUNDS, clock=clock)
        before, after = table.rows
        assert after.ratio is not None and after.low is not None and after.high is not None
        return before.p50, before.p50 / after.ratio, (1 / after.high, 1 / after.low)
