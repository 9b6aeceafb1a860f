"""What shells, build servers and strange files do to the command: one message, the right exit code, nothing half done."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from typer.testing import CliRunner

import surgeon
from surgeon.cli import main as cli
from surgeon.cli.arrays import read_arrays
from surgeon.cli.reported import in_the_shell
from surgeon.errors import InputError, QuantizeError
from surgeon.onnx.quantization.methods import WRITERS

SOURCE = """
import os, sys
from torch import nn

def make():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

class Exits(nn.Linear):
    def forward(self, x):
        sys.exit(0)

class Unsaid(Exception):
    def __str__(self):
        raise ValueError

def exits(): sys.exit(0)
def ends(): raise GeneratorExit
def unsaid(): raise Unsaid
def exits_in_forward(): return Exits(16, 4)

class FailsUnsaid(nn.Linear):
    def forward(self, x):
        raise Unsaid

def unsaid_in_forward(): return FailsUnsaid(16, 4)

def moves():
    os.chdir("/")
    return make()

def waits():
    print("ready", flush=True)
    import time
    time.sleep(60)
"""
QUICK = ("--input", "1,16", "--no-onnx", "--no-bench")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize("factory", ["exits", "ends", "unsaid", "exits_in_forward", "unsaid_in_forward"])
def test_what_ends_the_program_is_an_error(net: Path, tmp_path: Path, factory: str) -> None:
    done = run("shrink", f"{net}:{factory}", *QUICK, "--out", tmp_path / "out")
    assert done.exit_code == 1 and done.stderr.count("\n") >= 1 and "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_place_of_a_file_is_seen_before_the_work(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("shrink", f"{net}:make", *QUICK, "--out", out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "model.onnx").mkdir()
    done = run("shrink", f"{net}:exits", *QUICK, "--ratio", "0.25", "--out", out)
    assert done.exit_code == 1 and "there is a folder" in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_the_folder_is_the_one_of_the_shell(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("shrink", f"{net}:moves", *QUICK, "--out", "here")
    assert done.exit_code == 0 and "in here" in done.stdout and (tmp_path / "here" / "plan.json").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_modes_of_new_files(net: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        assert run("shrink", f"{net}:make", *QUICK, "--out", tmp_path / "out").exit_code == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_of_another_kind(net: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (4, 32), "2.bias": (4,)}
    save_file(
        {name: torch.ones(shape, dtype=dtype) for name, shape in state.items()}, tmp_path / "w.safetensors"
    )
    done = run(
        "shrink", f"{net}:make", *QUICK, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out"
    )
    assert done.exit_code == 1 and "another kind" in done.stderr and "0.weight" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_weights_of_another_precision(net: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (4, 32), "2.bias": (4,)}
    save_file(
        {name: torch.ones(shape, dtype=dtype) for name, shape in state.items()}, tmp_path / "w.safetensors"
    )
    done = run(
        "shrink", f"{net}:make", *QUICK, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--input", "99999999999999999999999,16"), "is not a shape"),
        (("--input", "4611686018427387904,4"), "is not a shape"),
        (("--input", "100000000000,16"), "is not a shape"),
        (("--round-to", "²"), "round_to"),
        (("--round-to", "9" * 5000), "round_to"),
        (("--round-to", "9223372036854775807"), "round_to"),
        (("--min-channels", "9223372036854775807"), "min_channels"),
        (("--latency", "0.5", "--threads", "99999999999"), "threads"),
        (("--runtime", "xx"), "unknown runtime"),
        (("--max-ratio", "0"), "max-ratio 0"),
        (("--min-channels", "32"), "min-channels 32"),
    ],
)
def test_numbers_that_are_none(net: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = run("shrink", f"{net}:make", *QUICK, *options, "--out", tmp_path / "out")
    assert words.replace("_", "-") in done.stderr.replace("_", "-") and "Traceback" not in done.output
    assert not isinstance(done.exception, ValueError | OverflowError)


@pytest.mark.parametrize("seed", ["-1", str(1 << 63), "9" * 40])
def test_seeds_that_are_none(net: Path, seed: str) -> None:
    assert run("inspect", f"{net}:make", "--input", "1,16", "--seed", seed).exit_code == 2


def test_float64_data_are_taken_as_the_models(net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((64, 16)))
    done = run(
        "shrink",
        f"{net}:make",
        "--data",
        tmp_path / "x.npy",
        "--no-onnx",
        "--no-bench",
        "--out",
        tmp_path / "o",
    )
    assert done.exit_code == 0 and "are torch.float64 and the model torch.float32" in done.stderr, done.output


def test_arrays_that_lie_over_each_other(tmp_path: Path) -> None:
    """A zip whose members are one and the same place of the file, many times."""
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros((1000, 100), np.float32))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as whole:
        start = whole.start_dir
    (size,) = {len(data) - start - 22}
    entry, end = data[start : start + size], bytearray(data[-22:])
    end[8:10] = end[10:12] = (40).to_bytes(2, "little")
    end[12:16] = (40 * size).to_bytes(4, "little")
    path.write_bytes(data[:start] + entry * 40 + bytes(end))
    with pytest.raises(InputError, match="lie over each other"):
        read_arrays(path)


def test_what_is_packed_too_tightly(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((300, 1 << 20), np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 20
    with pytest.raises(InputError, match="at most 268,435,456 are read"):
        read_arrays(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", ["json", "textproto", "onnxtxt", "onnx"])
def test_a_file_is_onnx_by_its_content(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_text('{"format": "surgeon-plan"}')
    done = run("doctor", tmp_path / f"x.{suffix}")
    assert done.exit_code == 1 and "not an ONNX file" in done.stderr


def file_with(path: Path, weight: float, width: int = 4, kind: Any = np.float32) -> Path:
    """x [N, width] -> a product with a weight of this number, as an ONNX file whose nodes have no name."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "w32"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.full((width, 4), weight, kind), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("method", ["fp16", "dynamic"])
def test_a_file_that_gives_no_numbers_is_refused(tmp_path: Path, method: str) -> None:
    source = file_with(tmp_path / "nan.onnx", float("nan"))
    with pytest.raises(QuantizeError):
        surgeon.quantize(source, tmp_path / "q.onnx", [torch.ones(1, 4)], method=method)
    assert not (tmp_path / "q.onnx").exists()


def test_a_quantised_file_that_overflows_is_refused_with_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = file_with(tmp_path / "a.onnx", 1.0)
    monkeypatch.setitem(
        WRITERS, "fp16", lambda path, draft, *_: file_with(draft, float("inf"), kind=np.float16)
    )
    with pytest.raises(QuantizeError, match="no finite numbers") as caught:
        surgeon.quantize(source, tmp_path / "q.onnx", [torch.ones(1, 4)], method="fp16")
    assert "a MatMul without a name" in caught.value.why and not (tmp_path / "q.onnx").exists()


def test_times_of_other_inputs_are_not_compared(tmp_path: Path) -> None:
    before, after = file_with(tmp_path / "a.onnx", 1.0, 64), file_with(tmp_path / "b.onnx", 1.0, 32)
    done = run("doctor", after, "--before", before)
    assert done.exit_code == 1 and "input 'x' is [1, 64] in the one file and [1, 32]" in done.stderr


def test_messages_name_options_of_the_shell() -> None:
    for said, meant in (
        ("pass a larger ratio, or round_to=1 if", "pass a larger ratio, or --round-to 1 if"),
        ("leave it, ignore=['head.fc', 'stem']", "leave it, --ignore head.fc --ignore stem"),
        ("min_channels=2, a smaller ratio", "--min-channels 2, a smaller ratio"),
        ("pass example_inputs=... with which", "pass --input or --data with which"),
        ("better: reduce_range=False", "better: --full-range"),
    ):
        assert in_the_shell(said) == meant


def started(*arguments: Any, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from surgeon.cli.main import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **how)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_a_full_disk_behind_stdout(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full, started(*arguments, stdout=full) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "cannot write to stdout" in errors and "Traceback" not in errors


def test_a_request_to_end_removes_what_is_not_finished(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with started("shrink", f"{net}:waits", *QUICK, "--out", out, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "terminated" in errors and "Traceback" not in errors
    assert not out.parent.exists()
    with contextlib.suppress(FileNotFoundError):
        assert not list(out.iterdir())
