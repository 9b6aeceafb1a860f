"""Row and Table: what a benchmark found, as text, markdown, JSON, CSV and a pandas frame."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgeon.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry at one batch size and number of threads: times in milliseconds, None where withheld or not
    defined.

    Attributes:
        name: the caller's name, with the backend where an entry ran on several.
        provider: what really ran it: "torch eager", or the session's ONNX Runtime execution providers.
        params: number of parameters; None for files.
        size_bytes: parameters and buffers in memory, or the file on disk (external weights included).
        samples: number of timed runs.
        p50, p90, p99: percentiles of one run, ms; p90 needs 64 samples, p99 662.
        ratio: median over rounds of reference time / this time (2.0: twice as fast); None for the reference.
        low, high: bootstrap 95 % interval of the ratio; None for the reference and below 6 rounds.
        gain: whether the whole interval is above 1.
        backend: as asked for.
        batch_size, threads: under which it ran.
        load_ms: making the session, or compiling; None for eager modules.
        cold_ms: the first run.
        peak_bytes: how far memory rose from before it was loaded to its highest in the first runs; None where
            unknown, as where it did not rise, because the process held enough that was free.
        throughput: rows per second at p50.
        nodes: execution provider -> number of ops that it ran; empty for modules.
        nchwc: whether convolutions took ONNX Runtime's blocked path; None where that does not apply.
    """

    name: str
    provider: str
    params: int | None
    size_bytes: int
    samples: int = 0
    p50: float = math.nan
    p90: float | None = None
    p99: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    gain: bool = False
    backend: str = ""
    batch_size: int = 0
    threads: int = 0
    load_ms: float | None = None
    cold_ms: float | None = None
    peak_bytes: int | None = None
    throughput: float | None = None
    nodes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    nchwc: bool | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows (the first of each batch size and number of threads is its reference) and what they were
    measured with.

    Attributes:
        batch_size, threads: the number, or all of them.
        warmup: untimed runs of the entry that had most.
        warnings: why the figures may not be trusted (a noisy machine), and which ops fell back to another
            provider.
    """

    rows: tuple[Row, ...]
    batch_size: int | tuple[int, ...]
    threads: int | tuple[int, ...]
    rounds: int
    warmup: int
    cpu: str
    isa: str
    torch: str
    onnxruntime: str | None
    clock: str = "wall"
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in ms."""
        return dataclasses.asdict(self)

    def json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def csv(self) -> str:
        """One line for each row, with a header; empty where a figure is withheld."""
        sink = io.StringIO()
        names = [field.name for field in dataclasses.fields(Row)]
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            values = dataclasses.asdict(row)
            values["nodes"] = "; ".join(f"{provider}: {count}" for provider, count in row.nodes.items())
            writer.writerow(["" if values[name] is None else values[name] for name in names])
        return sink.getvalue()

    def frame(self) -> Any:
        """A pandas DataFrame with one line for each row.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(
                "pandas is not installed", fix='pip install "surgeon-torch[deploy]"'
            ) from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.rows])

    def markdown(self) -> str:
        """A GitHub table, with the conditions below it."""
        rows = [_HEADER, ["---", "---", *["---:"] * (len(_HEADER) - 2)], *map(self._cells, self.rows)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", self._conditions()])

    def rich(self) -> RichTable:
        """The same table for a rich console; columns that say nothing are left out."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(caption=Text(self._conditions()), caption_justify="left")
        rows = [[cell.replace("ExecutionProvider", "") for cell in self._cells(row)] for row in self.rows]
        said = [place for place in range(len(_HEADER)) if any(row[place] != "-" for row in rows)]
        for place in said:
            table.add_column(_HEADER[place], justify="left" if place < 2 else "right", overflow="fold")
        for row, cells in zip(self.rows, rows, strict=True):
            table.add_row(*(Text(cells[place]) for place in said), style="green" if row.gain else None)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        sink = io.StringIO()
        Console(file=sink, width=150, color_system=None, force_terminal=False).print(self.rich())
        return sink.getvalue().rstrip()

    def _cells(self, row: Row) -> list[str]:
        several = [
            text
            for asked, text in (
                (self.batch_size, f"batch {row.batch_size}"),
                (self.threads, _threads(row.threads)),
            )
            if isinstance(asked, tuple)
        ]
        name = row.name + (f" ({', '.join(several)})" if several else "")
        times = ["-" if value is None else f"{value:.3f}" for value in (row.p50, row.p90, row.p99)]
        interval = " [-]" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
        ratio = "reference" if row.ratio is None else f"{row.ratio:.2f}x{interval}"
        gain = "" if row.ratio is None else "yes" if row.gain else "no"
        params = "-" if row.params is None else f"{row.params:,}"
        rest = ["-" if value is None else f"{value:,.1f}" for value in (row.load_ms, row.cold_ms)]
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}"
        rate = "-" if row.throughput is None else f"{row.throughput:,.1f}"
        return [name, row.provider, *times, ratio, gain, params, f"{row.size_bytes:,}", *rest, peak, rate]

    def _conditions(self) -> str:
        runtime = f", onnxruntime {self.onnxruntime}" if self.onnxruntime else ""
        threads = _threads(self.threads) if isinstance(self.threads, int) else "threads as shown"
        batch = f"batch {self.batch_size}" if isinstance(self.batch_size, int) else "batch as shown"
        rounds = f"{self.rounds} interleaved rounds after {self.warmup} warm-up runs, {self.clock} clock"
        return (
            f"{self.cpu} ({self.isa}), {threads}, {batch}, {rounds}, torch {self.torch}{runtime}. "
            "Ratio: reference time / time, median of rounds [bootstrap 95 % interval]; '-': unknown, or too few samples."
            + "".join(f" Warning: {text}." for text in self.warnings)
        )


_HEADER = [
    "model", "ran on", "p50 ms", "p90 ms", "p99 ms", "speed-up", "gain", "params", "bytes", "load ms", "first ms", "peak MB",
    "rows/s",
]  # fmt: skip


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"
