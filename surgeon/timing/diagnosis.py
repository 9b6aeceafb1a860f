"""What `doctor` finds in an ONNX file, layer by layer; printable."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from surgeon.timing.ort_profile import REORDERS

SHOWN = 8
SLOWER = 0.95  # share of the time before from which a layer has not become faster


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
        for layer in self.layers[:SHOWN]:
            was = "-" if layer.before_ms is None else f"{layer.before_ms:.3f}"
            widths = "" if layer.widths is None else f"{layer.widths[0]} -> {layer.widths[1]}"
            table.add_row(
                layer.op,
                layer.name,
                f"{layer.ms:.3f}",
                was,
                f"{self.share([layer]):.0%}",
                widths,
                remarks_on(layer),
            )
        console.print(table)
        for line in self.advice:
            console.print(f"- {line}", soft_wrap=True, markup=False, highlight=False)
        return out.getvalue().rstrip()


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
        return self.macs < INTENSE * self.bytes


INTENSE = (
    4.0  # MACs per byte from which a core computes longer than it waits for memory: some 60 GMAC/s at 15 GB/s
)


def remarks_on(layer: Layer) -> str:
    said = []
    if layer.fast is False:
        said.append("off the fast path")
    if layer.aligned is not None:
        (a, b), (c, d) = layer.aligned
        said.append(f"nearest whole blocks {either(a, b)} -> {either(c, d)}")
    if layer.before_ms is not None and layer.ms > SLOWER * layer.before_ms:
        said.append("not faster than before")
    if layer.op in REORDERS:
        said.append("puts channels into blocks or back")
    elif layer.waits:
        said.append("waits for memory")
    return "; ".join(said)


def either(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} or {high}"
