"""The command line: what it writes can be loaded; what goes wrong is said, exits with the right code, leaves
nothing behind.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import surgeon
from surgeon import Plan
from surgeon.cli import main as cli
from surgeon.cli import models
from surgeon.cli import shrink as shrinking
from surgeon.errors import InputError, MissingExtraError, ProofError

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids) + self.body(self.embed(ids)).relu())


def number():
    return 3


def broken():
    raise KeyError("no such thing")
"""
QUICK = ("--no-onnx", "--no-bench", "--input", "1,3,8,8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def made(source: Path, factory: str = "Net") -> nn.Module:
    spec = importlib.util.spec_from_file_location("net", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = getattr(module, factory)().eval()
    return model


def test_shrink_writes_files_that_fit_together(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    done = run("shrink", f"{source}:Net", "--input", "1,3,8,8", "--out", out)
    assert done.exit_code == 0, done.output
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "plan.json", "model.onnx"}
    for word in ("params", "MACs", "size (MB)", "median latency, ONNX", "proof: max relative error", "8"):
        assert word in done.stdout
    assert "weights are random" in done.stderr

    small = Plan.load(out / "plan.json").apply(made(source))
    assert small.conv.out_channels == 8
    small.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    x = torch.randn(4, 3, 8, 8)
    loaded = surgeon.load(out, lambda: made(source))
    assert not loaded.training and torch.equal(loaded(x), small(x))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, small(x).numpy(), atol=1e-5)


def test_weights_from_safetensors(source: Path, tmp_path: Path) -> None:
    model = made(source)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    done = run(
        "shrink", f"{source}:Net", *QUICK, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    assert "random" not in done.stderr
    plan = Plan.load(tmp_path / "out" / "plan.json")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["conv.weight"], model.conv.weight[plan.kept["conv.weight"][0]])


@pytest.mark.parametrize("names", [("embed.weight", "out.weight"), ("embed.weight",)])
def test_tied_weights(source: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    state = {name: value.clone() for name, value in made(source, "Tied").state_dict().items()}
    save_file({k: v for k, v in state.items() if k in names or "body" in k}, tmp_path / "w.safetensors")
    done = run(
        "shrink", f"{source}:Tied", "--input", "2,7", "--input-dtype", "int64", "--no-onnx", "--no-bench", "--ratio", "0.25",
        "--round-to", "1", "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    small = Plan.load(tmp_path / "out" / "plan.json").apply(made(source, "Tied"))
    small.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    assert small.out.weight is small.embed.weight
    assert small.embed.weight.shape == (20, 12)


def test_options_reach_the_plan(source: Path, tmp_path: Path) -> None:
    done = run(
        "shrink",
        f"{source}:Net",
        *QUICK,
        "--params",
        "0.6",
        "--round-to",
        "4",
        "--criterion",
        "l2",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    request = dict(Plan.load(tmp_path / "out" / "plan.json").request)
    options = {"scope": "knapsack", "round_to": 4, "heads": "both", "max_ratio": 1.0, "min_channels": 1}
    assert request == {"params": "0.6", "criterion": "l2", **options}


def test_the_seed_decides(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("shrink", f"{source}:Net", *QUICK, "--seed", seed, "--out", tmp_path / name).exit_code == 0
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize("flags", [(), ("--distill",)])
def test_data_win_accuracy_back(source: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As the API does: criterion and recovery see the same batches, the first of which is also the
    example.
    """
    model = made(source)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    inputs = np.random.default_rng(0).standard_normal((70, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=inputs) if flags else np.save(tmp_path / "data.npy", inputs)
    data = next(tmp_path.glob("data.*"))
    done = run(
        "shrink", f"{source}:Net", "--no-onnx", "--no-bench", "--weights", tmp_path / "w.safetensors", "--criterion", "kfac",
        "--macs", "0.5", "--round-to", "1", "--data", data, "--batch", "20", *flags, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plan = Plan.load(tmp_path / "out" / "plan.json")
    batches = list(torch.from_numpy(inputs).split(20))
    assert (
        plan.kept
        == surgeon.inspect(model, batches[0][:1])
        .plan(macs=0.5, criterion="kfac", data=batches, round_to=1)
        .kept
    )
    steps = ("refit", "batch_norm", "distill")[: 2 + len(flags)]
    wanted = surgeon.recover(plan.apply(model), plan, model, batches, steps=steps)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert not torch.equal(state["head.weight"], plan.apply(model).head.weight)
    assert str(wanted) in done.stdout and ("distill: " in done.stdout) == bool(flags)


def test_data_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((8, 5, 8, 8), np.float32))
    np.savez(tmp_path / "pairs.npz", x=np.zeros((8, 3, 8, 8), np.float32), labels=np.zeros(8))
    for arguments, words in (
        (("--data", tmp_path / "no.npy"), "cannot read the data"),
        (("--data", tmp_path / "wide.npy"), "expected input[1, 5, 8, 8] to have 3 channels"),
        (("--data", tmp_path / "pairs.npz"), "unexpected keyword argument 'labels'"),
        (("--distill",), "--distill needs samples"),
        (("--criterion", "kfac"), "--criterion kfac needs samples"),
    ):
        done = run(
            "shrink",
            f"{source}:Net",
            "--no-onnx",
            "--no-bench",
            *arguments,
            "--out",
            tmp_path / "new" / "out",
        )
        assert done.exit_code == 1 and words in done.stderr and "Traceback" not in done.output, done.output
        assert not (tmp_path / "new").exists()


def test_inspect_and_version(source: Path) -> None:
    done = run("inspect", f"{source}:Net", "--input", "1,3,8,8")
    assert done.exit_code == 0
    assert "conv.weight[0]: 16 channels" in done.stdout
    assert run("--version").stdout.startswith("surgeon ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}:nothing"], "no attribute 'nothing'"),
        (["{}:number"], "not a torch.nn.Module"),
        (["{}:broken"], "KeyError: 'no such thing'"),
        (["{}"], "path/to/file.py:factory"),
        (["missing.py:Net"], "there is no file 'missing.py'"),
        (["zoo/net"], "unknown model 'zoo/net'"),
        (["{}:Net", "--ratio", "1.5"], "ratio 1.5 is outside [0, 1)"),
        (["{}:Net", "--ratio", "0.5", "--macs", "0.5"], "ratio and macs together"),
        (["{}:Net", "--params", "1e-9"], "cannot be reached"),
        (["{}:Net", "--criterion", "luck"], "unknown criterion 'luck'"),
        (["{}:Net", "--ignore", "tail"], "ignore names 'tail'"),
        (["{}:Net", "--input", "1,x"], "is not a shape"),
        (["{}:Net", "--input", "1,5,8,8"], "does not run"),
        (["{}:Net", "--weights", "{}"], "cannot read the weights"),
    ],
)
def test_what_goes_wrong_is_said(source: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    first, *rest = (a.format(source) for a in arguments)
    done = run("shrink", first, *QUICK, *rest, "--out", tmp_path / "new" / "out")
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("head.bias"), "no head.bias in the file"),
        (lambda state: state.update(more=torch.ones(1)), "no more in the model"),
        (lambda state: state.update({"head.bias": torch.ones(3)}), "size mismatch for head.bias"),
    ],
)
def test_weights_that_do_not_fit(source: Path, tmp_path: Path, change: Any, words: str) -> None:
    state = made(source).state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    done = run(
        "shrink", f"{source}:Net", *QUICK, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "out"
    )
    assert done.exit_code == 1
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(source: Path) -> None:
    done = run("shrink", f"{source}:Net", *QUICK, "--out", source / "out")  # below a file
    assert done.exit_code == 1
    assert "cannot write to --out" in done.stderr


def test_a_failure_halfway_leaves_earlier_results_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run("shrink", f"{source}:Net", *QUICK, "--out", out).exit_code == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise ProofError("made to fail")

    # after model.safetensors and plan.json were written to the draft
    monkeypatch.setattr(shrinking, "export_any", fails)
    done = run("shrink", f"{source}:Net", "--input", "1,3,8,8", "--ratio", "0.25", "--out", out)
    assert done.exit_code == 1
    assert "made to fail" in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_second_run_leaves_nothing_of_the_first(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("shrink", f"{source}:Net", "--no-bench", "--input", "1,3,8,8", "--out", out).exit_code == 0
    for name in (
        "model.onnx.data",
        f"model.onnx.{'a' * 16}.data",
        "plan-2.json",
        "model.onnx.notes",
        "mine.txt",
    ):
        (out / name).write_text("{}")
    assert (
        run("shrink", f"{source}:Net", *QUICK, "--ratio", "0.25", "--round-to", "1", "--out", out).exit_code
        == 0
    )
    assert sorted(os.listdir(out)) == ["mine.txt", "model.onnx.notes", "model.safetensors", "plan.json"]
    assert surgeon.load(out, lambda: made(source)).conv.out_channels == 12


@pytest.mark.parametrize(
    "arguments",
    [["shrink"], ["shrink", "a", "--ratio", "x"], ["cut"], ["inspect", "a", "--input-dtype", "x"]],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_packages_that_do_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(models.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "surgeon-torch\[zoo\]"'):
        models.build("timm/resnet18")
    done = run("inspect", "transformers/bert")
    assert done.exit_code == 1
    assert 'pip install "surgeon-torch[zoo]"' in done.stderr

    def mismatched(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(models.importlib, "import_module", mismatched)
    with pytest.raises(InputError, match="built for another torch"):
        models.build("torchvision/resnet18")
