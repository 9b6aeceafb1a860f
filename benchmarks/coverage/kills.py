"""Writers that are killed (SIGKILL) at random moments: what is there afterwards is what one write left, as a whole.

    python -m benchmarks.coverage.kills [--kills 200] [--seed 0]

A child process writes one of two versions after the other, without an end, and is killed; then what stands there is
read: it must be one of both. Where a checkpoint is left, the training that goes on from it must end as one that was
never stopped. The tests kill at every rename, removal and sync instead; here it is the clock that says when.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from typer.testing import CliRunner

import surgeon
from benchmarks.lib.results import markdown, write_result
from surgeon.cli import main as cli

X = torch.linspace(-1, 1, 24).reshape(4, 6)
BATCHES = [(X, torch.tensor([0, 1, 2, 0]))]
WIDTH = 4096  # so that the weights of an ONNX file lie beside it
SOURCE = """import torch
def Net():
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
"""
Rows = np.ndarray


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def small(which: int, width: int = 16) -> nn.Module:
    """One of two small models of the same widths and other channels."""
    model = surgeon.shrink(net(width), 0.5, example_inputs=X, round_to=1, criterion="random", seed=which)
    with torch.no_grad():
        model[2].bias += which
    return model


def rows(model: nn.Module) -> Rows:
    with torch.no_grad():
        return model(X).numpy()


def of_file(path: Path) -> Rows:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


class Writer:
    """One way to write, and how to read what it wrote: `write(which)`, `read()` -> rows of outputs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.write: Callable[[int], object] = getattr(self, f"_write_{name}")
        self.read: Callable[[], Rows] = getattr(self, f"_read_{name}")
        if name == "quantize":
            for which in (0, 1):
                surgeon.export(small(which), folder / f"{which}.onnx", X)
        if name == "command":
            (folder / "net.py").write_text(SOURCE)

    def versions(self) -> list[Rows]:
        """What the two versions compute; the second one stays."""
        return [(self.write(which), self.read())[1] for which in (0, 1)]

    def _write_save(self, which: int) -> None:
        surgeon.save(small(which), self.folder / "out")

    def _read_save(self) -> Rows:
        return rows(surgeon.load(self.folder / "out", net))

    def _write_export(self, which: int) -> None:
        surgeon.export(small(which, WIDTH), self.folder / "out" / "m.onnx", X)

    def _read_export(self) -> Rows:
        return of_file(self.folder / "out" / "m.onnx")

    def _write_quantize(self, which: int) -> None:
        surgeon.quantize(self.folder / f"{which}.onnx", self.folder / "out" / "q.onnx", [X], method="fp16")

    def _read_quantize(self) -> Rows:
        return of_file(self.folder / "out" / "q.onnx")

    def _write_command(self, which: int) -> None:
        options = [
            "--no-bench",
            "--input",
            "4,6",
            "--round-to",
            "1",
            "--criterion",
            "random",
            "--seed",
            str(which),
        ]
        done = CliRunner().invoke(
            cli.app, ["shrink", f"{self.folder / 'net.py'}:Net", *options, "--out", str(self.folder / "out")]
        )
        assert done.exit_code == 0, done.output

    def _read_command(self) -> Rows:
        found = rows(surgeon.load(self.folder / "out", net))
        onnx = self.folder / "out" / "model.onnx"  # it may be gone, but is never another model's
        assert not onnx.exists() or np.allclose(found, of_file(onnx), atol=1e-4), "weights and file differ"
        return found

    def _write_finetune(self, which: int) -> None:
        (self.folder / "run.ckpt").unlink(missing_ok=True)
        surgeon.finetune(small(0), BATCHES, epochs=20, checkpoint=self.folder / "run.ckpt")

    def _read_finetune(self) -> Rows:
        model = small(0)
        surgeon.finetune(model, BATCHES, epochs=20, checkpoint=self.folder / "run.ckpt")
        return rows(model)


def killed(writer: Writer, seconds: float) -> None:
    """Write for this long, and die."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for which in itertools.cycle((0, 1)):
            writer.write(which)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the writer ended by itself"


def measured(name: str, kills: int, seed: int) -> Iterator[str]:
    """The cells of a row: kills, what was found how often, and what is wrong."""
    draw = random.Random(f"{seed} {name}")
    with tempfile.TemporaryDirectory() as place:
        writer = Writer(name, Path(place))
        start = time.perf_counter()
        versions = writer.versions()
        once = (time.perf_counter() - start) / 2
        found, wrong = [0, 0], list[str]()
        for _ in range(kills):
            killed(writer, draw.uniform(0, 4 * once))
            try:
                same = [np.allclose(writer.read(), version, atol=1e-6) for version in versions]
                assert any(same), "neither version"
                found[same.index(True)] += 1
            except Exception as error:  # noqa: BLE001  # the row says what went wrong
                wrong.append(f"{type(error).__name__}: {error}".splitlines()[0])
        writer.write(0)
        left = [file.name for file in Path(place).rglob(".*")]
    yield from (
        name,
        str(kills),
        f"{found[0]} / {found[1]}",
        "; ".join({*wrong}) or "none",
        ", ".join(left) or "none",
    )


NAMES = ("save", "export", "quantize", "command", "finetune")
HEADER = (
    "writer",
    "kills",
    "first / second version found",
    "mixed or unreadable",
    "left behind after the next write",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from surgeon.onnx import torch_export

    torch_export.INLINE_LIMIT = 10_000  # bytes: larger weights lie beside the file
    table = []
    for name in NAMES:
        table.append([*measured(name, asked.kills // len(NAMES), asked.seed)])
        print(" | ".join(table[-1]), flush=True)
    write_result("kills", "Writers killed at random moments", markdown(HEADER, table), [])


if __name__ == "__main__":
    main()
