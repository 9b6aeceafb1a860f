"""Predict what a choice costs in milliseconds, from a table of measured kernels.

The graph says which products (convolutions, matrix products, attention) a choice leaves, with their shapes.
Each distinct one is timed on the target at a few widths, and a surface a + b * in + c * out + d * in * out
through these points predicts the rest. All other ops together take what the whole model takes beyond its
products, in proportion to the bytes that they write. The table is kept on disk by runtime, version,
processor, threads, op and shapes, so that it is measured once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.errors import FileError, InputError, SurgeonWarning, warn
from surgeon.files import draft_folder, locked, put, read_file, regular_target
from surgeon.graph.graph import spec
from surgeon.latency.kernels import Choice, Kernel, Shapes, kernels, time_by_onnxruntime, time_by_torch
from surgeon.ops.ids import DimIds
from surgeon.ops.table import Family, family, op_name
from surgeon.timing.bench import cpu_name

RUNTIMES = ("onnxruntime", "torch")
_SHARES = (1.0, 0.5, 0.25)  # of each width: where a kernel is timed
_LARGEST = 64 << 20  # bytes of a table
_LONGEST = 1e9  # milliseconds
_TOGETHER = 24  # kernels timed in one session


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
        """Milliseconds by kernel, of this target."""
        return dict(self._file().get(self.target, {}))

    def _file(self) -> dict[str, dict[str, float]]:
        """What the file holds: milliseconds by target and kernel. Of a damaged file what is sound: all else is
        measured anew.
        """
        if not os.path.exists(self.path):
            return {}
        try:
            found = json.loads(read_file(self.path, _LARGEST))
        except (ValueError, RecursionError) as error:
            if isinstance(error, FileError):
                raise
            found = None
        if not isinstance(found, dict) or not all(isinstance(times, dict) for times in found.values()):
            warn(f"{self.path} is damaged: kernels are measured anew", SurgeonWarning)
            return {}
        sound = {
            target: {k: ms for k, ms in times.items() if _is_time(ms)} for target, times in found.items()
        }
        if sound != found:
            warn(f"{self.path} holds times that are none: these are measured anew", SurgeonWarning)
        return sound

    def times(self, wanted: Iterable[Kernel]) -> None:
        """Time what the table does not hold yet, and keep it, with what others measured meanwhile.

        Raises:
            FileError: the table cannot be read or written.
        """
        todo = [kernel for kernel in dict.fromkeys(wanted) if kernel.key not in self.known]
        new: dict[str, float] = {}
        for first in range(0, len(todo), _TOGETHER):
            some = todo[first : first + _TOGETHER]
            new.update(zip((kernel.key for kernel in some), self._time(some), strict=True))
        self.known.update(new)
        self.measured += len(new)
        if new:
            self._keep(new)

    def _keep(self, new: Mapping[str, float]) -> None:
        place = regular_target(self.path)
        with draft_folder(place.parent) as draft, locked(place.parent):
            everything = self._file()
            everything[self.target] = {**everything.get(self.target, {}), **new}
            (draft / "table").write_text(json.dumps(everything, indent=0))
            put(draft / "table", place)

    def _time(self, todo: Sequence[Kernel]) -> list[float]:
        if self._timer is not None:
            return self._timer(todo)
        if self.runtime == "onnxruntime":
            return time_by_onnxruntime(todo, self.threads)
        return time_by_torch(todo, self.threads, self.device, self.dtype)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LONGEST


class Predictor:
    """Milliseconds of a choice, before anything is cut.

    Args:
        whole: the choice that keeps everything.
        total: measured milliseconds of the whole original.
        block: widths at which kernels are timed are multiples of it.
    """

    def __init__(self, shapes: Shapes, whole: Choice, table: LatencyTable, total: float, block: int) -> None:
        self.shapes, self.table, self.total = shapes, table, total
        self._original = kernels(shapes, whole)
        self._points = {
            k: [k.at(a, b, block) for a in _SHARES for b in _SHARES] for own in self._original for k in own
        }
        table.times(kernel for points in self._points.values() for kernel in points)
        self._surfaces = {kernel: self._surface(points) for kernel, points in self._points.items()}
        called = [node for node in shapes.graph.fx.nodes if node.op == "call_function"]
        multiplied, simple = set(shapes.products), (Family.ELEMENTWISE, Family.REDUCTION)
        self._others = [n for n in called if n not in multiplied and family(op_name(n)) in simple]
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

    def _surface(self, points: Sequence[Kernel]) -> DimIds:
        """Least squares of relative errors, with coefficients that are not negative."""
        rows = np.stack([_features(kernel) for kernel in points])
        times = np.array([max(self.table.known[kernel.key], 1e-4) for kernel in points])
        left, right = rows / times[:, None], np.ones(len(points))
        scale = np.abs(left).max(axis=0)
        surface: DimIds = _nonnegative(left / scale, right) / scale
        return surface

    def _written(self, choice: Choice) -> float:
        """Bytes that all other ops write."""
        return float(
            sum(math.prod(self.shapes.shape(n, choice)) * spec(n).dtype.itemsize for n in self._others)
        )


def _features(kernel: Kernel) -> DimIds:
    into, out = kernel.widths
    found: DimIds = np.array([1.0, into, out, into * out / kernel.groups])
    return found


def _nonnegative(rows: DimIds, want: DimIds) -> DimIds:
    """Least squares with coefficients >= 0: the worst negative one is left out until there is none."""
    active = list(range(rows.shape[1]))
    while True:
        found = np.zeros(rows.shape[1])
        found[active] = np.linalg.lstsq(rows[:, active], want, rcond=None)[0]
        if found.min() >= 0 or len(active) == 1:
            clipped: DimIds = np.maximum(found, 0.0)
            return clipped
        active.remove(int(np.argmin(found)))
