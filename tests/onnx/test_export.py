"""export writes a file that computes what the model computes, or no file at all."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import ExportError, InputError
from surgeon.fusion.fuse import fuse
from surgeon.onnx.compare import relative_error
from surgeon.onnx.export import export
from surgeon.onnx.file import is_weights_of

exporter = importlib.import_module("surgeon.onnx.torch_export")


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model.eval()


def _run(path: Path, **inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if not {item.name for item in session.get_inputs()} >= inputs.keys():
        inputs = {session.get_inputs()[0].name: next(iter(inputs.values()))}
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def test_fused_cnn_with_a_dynamic_batch(
    cnn: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fused = fuse(cnn, torch.randn(1, 3, 9, 9))
    fused[2].train()  # a flag to be kept
    flags = [m.training for m in fused.modules()]
    path = tmp_path / "new" / "model.onnx"
    report = export(fused, path, torch.randn(1, 3, 9, 9))
    assert capfd.readouterr() == ("", "")
    assert [m.training for m in fused.modules()] == flags
    assert report.path == path and [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert report.batch_sizes == (2, 3) and report.error < 1e-5
    assert report.size_bytes == path.stat().st_size
    assert report.params >= sum(p.numel() for p in fused.parameters())
    proto = onnx.load(str(path))
    assert report.opset == next(o.version for o in proto.opset_import if not o.domain)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    for batch in (1, 5):
        x = torch.randn(batch, 3, 9, 9)
        (found,) = _run(path, x=x)
        with torch.no_grad():
            assert relative_error(found, cnn(x).numpy()) < 1e-5  # the model before the fold
    assert str(path) in str(report) and "batch 2, 3" in str(report)


def test_a_batch_of_one_is_doubled_for_the_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, shapes = torch.onnx.export, []

    def spy(model: nn.Module, args: Any, **options: Any) -> Any:
        shapes.append((args[0].shape[0], options["dynamic_shapes"]))
        return right(model, args, **options)

    monkeypatch.setattr(torch.onnx, "export", spy)
    export(nn.Linear(4, 3), tmp_path / "a.onnx", torch.randn(1, 4))
    export(nn.Linear(4, 3), tmp_path / "b.onnx", torch.randn(4, 4))
    export(nn.Linear(4, 3), tmp_path / "c.onnx", torch.randn(1, 4), dynamic_batch=False)
    assert shapes == [(2, ({0: "batch"},)), (4, ({0: "batch"},)), (1, None)]


def test_fixed_batch(cnn: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = export(cnn, path, torch.randn(1, 3, 9, 9), dynamic_batch=False)
    assert report.batch_sizes == (1,)
    shape = onnx.load(str(path)).graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 3, 9, 9]


class _Words(nn.Module):
    """Keyword inputs of several dtypes, an output that is a dict; the keywords come in another order than
    forward's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor, bias: Tensor | None = None) -> dict[str, Tensor | None]:
        hidden = (self.embed(ids) * mask[..., None]).mean(1)
        return {
            "hidden": hidden,
            "nothing": None,
            "logits": self.head(hidden) + (0 if bias is None else bias),
        }


def test_dict_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Words().train()
    inputs = {"bias": torch.randn(3), "mask": torch.ones(1, 7), "ids": torch.arange(7)[None]}
    report = export(model, tmp_path / "words.onnx", {**inputs, "bias": inputs["bias"].expand(1, 3)})
    assert model.training and report.error < 1e-5
    new = {"ids": torch.randint(0, 10, (5, 7)), "mask": torch.rand(5, 7), "bias": torch.randn(5, 3)}
    found = _run(tmp_path / "words.onnx", **new)
    with torch.no_grad():
        expected = model(**new)
    assert relative_error(found[0], expected["hidden"].numpy()) < 1e-5
    assert relative_error(found[1], expected["logits"].numpy()) < 1e-5


def test_tuple_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a - 2 * b, a.argmax(1)

    assert export(Two(), tmp_path / "two.onnx", (torch.randn(3, 4), torch.randn(3, 4))).batch_sizes == (3, 5)


def test_a_wrong_bias_is_caught(cnn: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.onnx.ONNXProgram.save

    def wrong(program: Any, path: Path, **options: Any) -> None:
        right(program, path, **options)
        proto = onnx.load(str(path))
        (bias,) = (t for t in proto.graph.initializer if t.name == "5.bias")
        values = onnx.numpy_helper.to_array(bias).copy()
        values[2] += 1e-2
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(proto, str(path))

    path = tmp_path / "model.onnx"
    path.write_text("what was there before")
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", wrong)
    with pytest.raises(ExportError, match="computes something else"):
        export(cnn, path, torch.randn(2, 3, 9, 9))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "what was there before"


def test_an_illegal_file_is_caught(cnn: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(program: Any, path: Path, **options: Any) -> None:
        node = onnx.helper.make_node("NoSuchOp", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [], [])
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", damaged)
    with pytest.raises(ExportError, match="illegal file"):
        export(cnn, tmp_path / "model.onnx", torch.randn(2, 3, 9, 9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/model.onnx", "folder"])
def test_unwritable_path(cnn: nn.Module, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="cannot write"):
        export(cnn, tmp_path / name, torch.randn(2, 3, 9, 9))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


class _Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] == 2 else x


class _Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1, 4) * 2


@pytest.mark.parametrize("model", [_Fixed(), _Viewed()])
def test_a_batch_that_is_fixed_by_the_code(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export(model, tmp_path / "model.onnx", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []
    assert export(model, tmp_path / "model.onnx", torch.randn(2, 4), dynamic_batch=False).batch_sizes == (2,)


def test_an_op_that_onnx_does_not_have(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError, match="could not export") as caught:
        export(Odd(), tmp_path / "model.onnx", torch.randn(2, 4, 4))
    assert "eig" in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_random_forward_is_caught(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ExportError, match="computes something else"):
        export(Noise(), tmp_path / "model.onnx", torch.randn(2, 4))


def test_opset(cnn: nn.Module, tmp_path: Path) -> None:
    assert export(cnn, tmp_path / "model.onnx", torch.randn(2, 3, 9, 9), opset=18).opset == 18
    with pytest.raises(ExportError, match="opset 999"):
        export(cnn, tmp_path / "other.onnx", torch.randn(2, 3, 9, 9), opset=999)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).half()
    assert export(model, tmp_path / "half.onnx", torch.randn(2, 4).half()).error < 1e-2


def test_large_weights_lie_next_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "INLINE_LIMIT", 1000)
    model, path = nn.Linear(64, 64), tmp_path / "large.onnx"
    report = export(model, path, torch.randn(2, 64))
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[0] == "large.onnx" and len(names) == 2 and is_weights_of(names[1], "large.onnx")
    assert report.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) > 4 * 64 * 64
    assert report.params >= 64 * 65
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert relative_error(_run(path, input=x)[0], model(x).numpy()) < 1e-5
    (tmp_path / "large.onnx.data").write_bytes(b"of an earlier version")
    (tmp_path / "other.onnx.data").write_bytes(b"another's")
    export(nn.Linear(64, 64), path, x)
    again = sorted(file.name for file in tmp_path.iterdir())
    assert len(again) == 3 and again[2] == "other.onnx.data" and again[1] != names[1]
    monkeypatch.setattr(exporter, "INLINE_LIMIT", 10**9)
    export(model, path, x)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "other.onnx.data"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nn\.Module"):
        export("model", tmp_path / "m.onnx", torch.randn(2, 4))  # type: ignore[arg-type]  # the bad argument
    with pytest.raises(InputError):
        export(nn.Linear(4, 4), tmp_path / "m.onnx", "no tensor")
    with pytest.raises(ExportError, match="batch dimension"):
        export(nn.ReLU(), tmp_path / "m.onnx", torch.tensor(1.0))
    assert list(tmp_path.iterdir()) == []


def test_relative_error() -> None:
    one, inf, nan = np.ones(2), np.array([1.0, np.inf]), np.array([1.0, np.nan])
    assert relative_error(one, one) == 0.0
    assert relative_error(one, 2 * one) == 0.5
    assert relative_error(np.array([1.0, 4.5]), np.array([1.0, 5.0])) == pytest.approx(0.1)
    assert relative_error(inf, inf) == relative_error(nan, nan) == 0.0
    assert relative_error(0 * one, 0 * one) == 0.0
    for found, expected in (
        (one, inf),
        (inf, one),
        (nan, one),
        (-inf, inf),
        (one, 0 * one),
        (one, np.ones(3)),
    ):
        assert relative_error(found, expected) == np.inf
