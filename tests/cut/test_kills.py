"""Writers that are killed, at every rename, removal and sync; and several writers at once: a folder is what one of
them wrote, old or new as a whole.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon.cli import main as cli
from surgeon.cli.folder import draft_in as draft_folder
from surgeon.errors import FileError
from surgeon.latency.predict import LatencyTable
from surgeon.onnx import file as onnx_file

X = torch.linspace(-1, 1, 24).reshape(4, 6)


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def small(which: int, width: int = 16) -> nn.Module:
    """One of several small models of the same widths and other channels."""
    model = surgeon.shrink(net(width), 0.5, example_inputs=X, round_to=1, criterion="random", seed=which)
    with torch.no_grad():
        model[2].bias += which
    return model


def killed(work: Callable[[], Any], check: Callable[[], None]) -> int:
    """Run `work` in forked processes, each killed at the next rename, removal or sync; check after each. How many
    there were.
    """
    sys.stdout.flush()
    for count in range(1, 200):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                _die_at(count)
                work()
            except BaseException:  # noqa: BLE001  # nothing may come back into the tests
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        check()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return count - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("it does not end")


def _die_at(count: int) -> None:
    left = [count]

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


def outputs(path: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    return found


def rows(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(X).numpy()


def one_of(found: Any, models: list[nn.Module]) -> int:
    """Which of the models computes this."""
    (same,) = [number for number, model in enumerate(models) if np.allclose(found, rows(model), atol=1e-5)]
    return same


def test_save(tmp_path: Path) -> None:
    models = [small(0), small(1)]
    twice = surgeon.shrink(small(0), 0.5, example_inputs=X, round_to=1)
    models.append(twice)
    surgeon.save(models[0], tmp_path)
    seen = set()

    def check() -> None:
        seen.add(one_of(rows(surgeon.load(tmp_path, net)), models))
        if (tmp_path / "plan.json").exists():  # then it is the one of the weights
            first = surgeon.Plan.load(tmp_path / "plan.json").apply(net())
            assert one_of(rows(surgeon.load(tmp_path, net)), models) == 2 or first[0].weight.shape == (8, 6)

    for new in (1, 2, 0):
        seen.clear()
        assert killed(lambda new=new: surgeon.save(models[new], tmp_path), check) >= 7
        assert new in seen and len(seen) == 2, "old and new, and nothing else"
    names = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    surgeon.save(models[0], tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "plan.json"], names


def test_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files are made beforehand; what is killed is how they come to their place."""
    monkeypatch.setattr(importlib.import_module("surgeon.onnx.torch_export"), "INLINE_LIMIT", 100)
    path, models = tmp_path / "out" / "m.onnx", [small(0, 512), small(1, 512)]
    for number, model in enumerate(models):
        surgeon.export(model, tmp_path / str(number) / "m.onnx", X)
    surgeon.export(models[0], path, X)

    def work(number: int) -> None:
        with onnx_file.draft_of(path) as draft:
            for file in (tmp_path / str(number)).iterdir():
                shutil.copy(file, draft.parent / file.name)

    seen = set()
    for new in (1, 0):
        seen.clear()
        check = lambda: seen.add(one_of(outputs(path), models))  # noqa: E731
        assert killed(lambda new=new: work(new), check) >= 6
        assert seen == {0, 1}
    work(1)
    assert len(os.listdir(path.parent)) == 2


SOURCE = """
import torch
from torch import nn
def Net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""


def command(out: Path, seed: int) -> list[str]:
    source = out.parent / "net.py"
    source.write_text(SOURCE)
    options = ["--no-bench", "--input", "4,6", "--round-to", "1", "--seed", str(seed), "--out", str(out)]
    return ["shrink", f"{source}:Net", *options]


def test_the_folder_of_the_command(tmp_path: Path) -> None:
    """As for external weights; the first one has no ONNX file, the second and third have one."""
    out, made = tmp_path / "out", [tmp_path / name for name in "abc"]
    for number, folder in enumerate(made):
        done = CliRunner().invoke(cli.app, command(folder, number) + ["--no-onnx"] * (number == 0))
        assert done.exit_code == 0, done.output
    models = [surgeon.load(folder, net) for folder in made]

    def work(number: int) -> None:
        with draft_folder(out) as draft:
            for file in made[number].iterdir():
                shutil.copy(file, draft / file.name)

    seen = set()

    def check() -> None:
        which = one_of(rows(surgeon.load(out, net)), models)
        seen.add(which)
        if (out / "model.onnx").exists():
            assert one_of(outputs(out / "model.onnx"), models) == which

    work(0)
    for new in (1, 2, 0):
        seen.clear()
        assert killed(lambda new=new: work(new), check) >= 6
        assert len(seen) == 2 and new in seen
        assert sorted(os.listdir(out)) == sorted(os.listdir(made[new]))


def test_checkpoints(tmp_path: Path) -> None:
    path, batches = tmp_path / "run.ckpt", [(X, torch.tensor([0, 1, 2, 0]))]
    model, expected = small(0), small(0)
    surgeon.finetune(expected, batches, epochs=2)

    def check() -> None:
        if path.exists():
            shutil.copy(path, tmp_path / "copy")
            again = small(0)
            surgeon.finetune(again, batches, epochs=2, checkpoint=tmp_path / "copy")
            assert np.array_equal(rows(again), rows(expected))

    assert killed(lambda: surgeon.finetune(model, batches, epochs=2, checkpoint=path), check) >= 4
    assert [name for name in os.listdir(tmp_path) if "ckpt" in name or name.startswith(".")] == ["run.ckpt"]


TRUTH = {"export": "m.onnx", "quantise": "q.onnx", "command": "model.safetensors"}


@pytest.mark.parametrize("kind", TRUTH)
def test_killed_before_the_rename(tmp_path: Path, kind: str) -> None:
    """The whole way, in a process of its own: what was there stays, and the next run cleans up."""
    surgeon.export(small(0), tmp_path / "float.onnx", X)
    folder = tmp_path / "out"
    write(kind, str(tmp_path), 0)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    process = multiprocessing.get_context("spawn").Process(target=die_in, args=(kind, str(tmp_path)))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert any(name.startswith(".surgeon-") for name in os.listdir(folder))
    left = {
        file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name in before
    }
    assert TRUTH[kind] in left  # what stands beside it may be gone, but is never another model's
    assert left == {name: before[name] for name in left}
    write(kind, str(tmp_path), 1)
    assert sorted(os.listdir(folder)) == sorted(before)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} != before


def write(kind: str, place: str, which: int) -> None:
    folder = Path(place)
    if kind == "export":
        surgeon.export(small(which), folder / "out" / "m.onnx", X)
    elif kind == "quantise":
        method = ("fp16", "dynamic")[which]
        surgeon.quantize(folder / "float.onnx", folder / "out" / "q.onnx", [X], method=method)
    else:
        done = CliRunner().invoke(cli.app, command(folder / "out", which))
        assert done.exit_code == 0, done.output


def die_in(kind: str, place: str) -> None:
    torch.set_num_threads(1)
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).parent.name == "out":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying
    write(kind, place, 1)


# -- several writers at once --------------------------------------------------------------------------------------


def save_often(folder: str, which: int) -> None:
    torch.set_num_threads(1)
    model = small(which)
    for _ in range(8):
        surgeon.save(model, folder)


def keep_often(path: str, which: int) -> None:
    table = LatencyTable(path=path, timer=lambda kernels: [1.0] * len(kernels))
    table._keep({})
    for number in range(20):
        table._keep({f"kernel {which}.{number}": 1.0})


def at_once(work: Callable[..., None], path: Path, look: Callable[[], None]) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(str(path), which)) for which in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        look()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    look()


def test_three_writers_of_one_folder(tmp_path: Path) -> None:
    models = [small(which) for which in range(3)]
    surgeon.save(models[0], tmp_path)
    at_once(save_often, tmp_path, lambda: one_of(rows(surgeon.load(tmp_path, net)), models) and None)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "plan.json"]


def test_three_writers_of_one_table(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    at_once(keep_often, path, lambda: json.loads(path.read_text()) if path.exists() else None)
    (times,) = json.loads(path.read_text()).values()
    assert len(times) == 60 and os.listdir(tmp_path) == ["latency.json"]


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileError, match="a folder"):
        surgeon.save(small(0), tmp_path)
    with pytest.raises(FileError, match="Not a directory"):
        (tmp_path / "file").write_text("x")
        surgeon.save(small(0), tmp_path / "file" / "x")
