"""quantize: sizes, errors against arithmetic by hand, and one clear error for each bad input."""

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

from surgeon.errors import FileError, InputError, QuantizeError, SurgeonError
from surgeon.onnx.export import export
from surgeon.onnx.quantization.quantize import quantize
from surgeon.onnx.quantization.saturation import products_saturate


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).eval()
    path = tmp_path_factory.mktemp("quantize") / "cnn.onnx"
    export(model, path, torch.randn(2, 3, 8, 8))
    return model, path


def _batches(count: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def _run(path: Path, x: Tensor) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


_LIMITS = {"static": (0.3, 0.1), "dynamic": (0.5, 0.05), "fp16": (0.52, 2e-3)}


@pytest.mark.parametrize("method", _LIMITS)
def test_methods(cnn: tuple[nn.Module, Path], tmp_path: Path, method: str) -> None:
    model, path = cnn
    batches = _batches()
    report = quantize(path, tmp_path / "new" / "small.onnx", batches, method=method)
    size, error = _LIMITS[method]
    assert report.size_before == path.stat().st_size and report.size_after == report.path.stat().st_size
    assert report.size_after < size * report.size_before
    with torch.no_grad():
        expected = torch.cat([model(x) for x in batches]).numpy()
    found = np.concatenate([_run(report.path, x) for x in batches])
    assert report.error == pytest.approx(
        np.linalg.norm(found - expected) / np.linalg.norm(expected), rel=1e-3
    )
    assert 0 < report.error < error
    assert len(report.layers) == 4 and list(report.layers) == sorted(report.layers, key=lambda x: -x.added)
    last = next(layer for layer in report.layers if layer.name == "node_linear_1")
    close = 0.2 if method == "fp16" else 1e-6  # ONNX Runtime leaves out the rounding of what nobody looks at
    assert last.error == pytest.approx(report.error, rel=close) and 0 <= last.added <= last.error
    facts = {item.key: item.value for item in onnx.load(str(report.path)).metadata_props}
    assert facts["surgeon.quantized"] == method and "surgeon.macs" in facts
    assert [file.name for file in report.path.parent.iterdir()] == ["small.onnx"]
    assert report.layers[0].name in str(report)


def _weights(path: Path) -> dict[str, Any]:
    initializers = onnx.load(str(path)).graph.initializer
    return {
        t.name: onnx.numpy_helper.to_array(t) for t in initializers if t.name.endswith("weight_quantized")
    }


def test_static_is_signed_per_channel_qdq(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    report = quantize(cnn[1], tmp_path / "a.onnx", _batches())
    proto = onnx.load(str(report.path))
    scales = [tuple(t.dims) for t in proto.graph.initializer if t.name.endswith("weight_scale")]
    assert (32,) in scales and (64,) in scales
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    assert {values.dtype for values in _weights(report.path).values()} == {np.dtype(np.int8)}


def test_a_scale_for_each_channel_keeps_small_channels(tmp_path: Path) -> None:
    """One channel is a hundred times as large as the others: one scale for all leaves these a few steps."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        model.weight[0] *= 100
    export(model, tmp_path / "a.onnx", torch.randn(2, 3, 8, 8))
    exact, errors = model.weight.detach().numpy(), []
    for each in (True, False):
        quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", _batches(), per_channel=each)
        stored = {
            t.name: onnx.numpy_helper.to_array(t)
            for t in onnx.load(str(tmp_path / "b.onnx")).graph.initializer
        }
        found = stored["weight_quantized"] * stored["weight_scale"].reshape(-1, 1, 1, 1)
        errors.append(np.abs(found - exact)[1:].max() / np.abs(exact[1:]).max())
    assert errors[0] < 0.01 and errors[1] > 0.3


@pytest.mark.parametrize("saturates", [True, False])
@pytest.mark.parametrize(("reduce_range", "largest"), [(None, None), (True, 64), (False, 127)])
def test_weights_of_seven_bits(
    cnn: tuple[nn.Module, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saturates: bool,
    reduce_range: bool | None,
    largest: int | None,
) -> None:
    """Left out, they are for CPUs whose products saturate; the report says so, and where its numbers hold."""
    monkeypatch.setattr("surgeon.onnx.quantization.saturation.products_saturate", lambda: saturates)
    report = quantize(cnn[1], tmp_path / "a.onnx", _batches(), reduce_range=reduce_range)
    found = max(int(np.abs(values.astype(int)).max()) for values in _weights(report.path).values())
    assert found == (largest or (64 if saturates else 127))
    assert report.weight_bits == (7 if found == 64 else 8) and ("7 bits" in str(report)) == (found == 64)
    assert report.saturates == (saturates and found == 127)
    assert ("saturate on this CPU" in str(report)) == report.saturates
    assert report.error < 0.02  # whatever this CPU does


def test_a_cpu_that_saturates_is_known(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Outputs of a session as users open it differ from exact ones just where the products saturate."""
    report = quantize(cnn[1], tmp_path / "a.onnx", _batches(), reduce_range=False)
    with torch.no_grad():
        expected = torch.cat([cnn[0](x) for x in _batches()]).numpy()
    found = np.concatenate([_run(report.path, x) for x in _batches()])
    served = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert (served > 3 * report.error) == products_saturate() == report.saturates
    safe = quantize(cnn[1], tmp_path / "b.onnx", _batches(), reduce_range=True)
    found = np.concatenate([_run(safe.path, x) for x in _batches()])
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) == pytest.approx(safe.error, rel=1e-3)


class Words(nn.Module):
    """One norm for two places: ONNX Runtime fails where its exact mode changes the norm's weights twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids))
        return self.head(self.norm(x + self.mix(x).relu()))  # type: ignore[no-any-return]  # torch's


def test_weights_that_two_nodes_read(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    export(Words().eval(), tmp_path / "a.onnx", ids)
    for per_channel in (True, False):
        report = quantize(
            tmp_path / "a.onnx", tmp_path / f"{per_channel}.onnx", [ids], per_channel=per_channel
        )
        assert report.error < 0.05


def test_ranges_differ(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Of values with long tails, entropy and percentile take less than all."""
    wild = [x**3 for x in _batches(8)]
    scales = {}
    for ranges in ("minmax", "entropy", "percentile"):
        proto = onnx.load(str(quantize(cnn[1], tmp_path / f"{ranges}.onnx", wild, ranges=ranges).path))
        (scale,) = (t for t in proto.graph.initializer if t.name == "input_scale")
        scales[ranges] = float(onnx.numpy_helper.to_array(scale))
    widest = max(float(x.max()) for x in wild) - min(float(x.min()) for x in wild)
    assert scales["minmax"] == pytest.approx(widest / 255, rel=1e-3)
    assert scales["percentile"] < scales["minmax"] and scales["entropy"] < scales["minmax"]


def test_the_worst_layer_is_found_and_can_be_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
        model[2].weight[:, 0] = 50.0  # it only ever meets zeros, but spoils the scale of the whole weight
    export(model, tmp_path / "a.onnx", torch.randn(2, 8))
    batches = [torch.randn(16, 8) for _ in range(4)]
    report = quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", batches, per_channel=False)
    names = [node.name for node in onnx.load(str(tmp_path / "a.onnx")).graph.node if node.op_type == "Gemm"]
    assert report.layers[0].name == names[1]
    better = quantize(tmp_path / "a.onnx", tmp_path / "c.onnx", batches, per_channel=False, ignore=[names[1]])
    assert better.error < report.error / 2


def test_scores_of_both_files(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    seen = []

    def evaluate(run: Any) -> float:
        seen.append(run(_batches()[0])[0].argmax(1))
        return float(len(seen))

    report = quantize(cnn[1], tmp_path / "a.onnx", _batches(), evaluate=evaluate)
    assert (report.score_before, report.score_after) == (1.0, 2.0) and "1.0000 -> 2.0000" in str(report)
    assert (seen[0] == seen[1]).mean() >= 0.75


@pytest.mark.parametrize("ranges", ["minmax", "entropy", "percentile"])
def test_batches_may_differ_in_size(cnn: tuple[nn.Module, Path], tmp_path: Path, ranges: str) -> None:
    rows = torch.cat(_batches(5))
    parts = [
        quantize(cnn[1], tmp_path / f"{n}.onnx", rows.split(n), ranges=ranges, test_batches=[rows])
        for n in (8, 4)
    ]
    assert parts[0].error == pytest.approx(parts[1].error, rel=1e-6)


def test_bad_input(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    path = cnn[1]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "text.onnx").write_text("not a model")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes(path.read_bytes()[:5000])
    (folder / "sub").mkdir()
    onnx.save(
        onnx.load(str(path)),
        str(folder / "apart.onnx"),
        save_as_external_data=True,
        location="apart.data",
        size_threshold=1000,
    )
    apart = (folder / "apart.data").read_bytes()
    (folder / "short.onnx").write_bytes(
        (folder / "apart.onnx").read_bytes().replace(b"apart.data", b"short.data")
    )
    (folder / "short.data").write_bytes(apart[:100])
    (folder / "apart.data").unlink()
    export(nn.Conv2d(3, 4, 1), folder / "conv.onnx", torch.randn(2, 3, 8, 8))
    out, good = tmp_path / "out" / "a.onnx", _batches(1)
    bad: list[tuple[str, type[SurgeonError], Any, Any, Any, dict[str, Any]]] = [
        ("no such file", FileError, folder / "none.onnx", out, good, {}),
        ("folder", FileError, folder / "sub", out, good, {}),
        ("empty", FileError, folder / "empty.onnx", out, good, {}),
        ("not an ONNX file", FileError, folder / "text.onnx", out, good, {}),
        ("not an ONNX file", FileError, folder / "cut.onnx", out, good, {}),
        ("apart.data is missing", FileError, folder / "apart.onnx", out, good, {}),
        ("short.data has 100 of", FileError, folder / "short.onnx", out, good, {}),
        ("cannot write", FileError, path, folder / "sub", good, {}),
        ("cannot write", FileError, path, folder / "text.onnx" / "a.onnx", good, {}),
        ("no batches", InputError, path, out, [], {}),
        ("method 'int4'", InputError, path, out, good, {"method": "int4"}),
        ("ranges 'mean'", InputError, path, out, good, {"ranges": "mean"}),
        ("no node 'x'", InputError, path, out, good, {"ignore": ["x"]}),
        ("no weights of 7 bits", InputError, path, out, good, {"method": "fp16", "reduce_range": True}),
        ("batch 0 does not fit", QuantizeError, path, out, [torch.randn(4, 3, 7, 8)], {}),
        ("batch 1 does not fit", QuantizeError, path, out, [*good, "text"], {}),
        ("nothing was quantised", QuantizeError, folder / "conv.onnx", out, good, {"method": "dynamic"}),
    ]
    before = sorted(folder.rglob("*"))
    for match, kind, source, target, batches, options in bad:
        with pytest.raises(kind, match=match):
            quantize(source, target, batches, **options)
    assert sorted(folder.rglob("*")) == before and not out.parent.exists()


def test_external_weights_are_found(cnn: tuple[nn.Module, Path], tmp_path: Path) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(
        onnx.load(str(cnn[1])),
        str(path),
        save_as_external_data=True,
        location="apart.data",
        size_threshold=1000,
    )
    report = quantize(path, tmp_path / "out" / "small.onnx", _batches())
    assert report.size_before == path.stat().st_size + (tmp_path / "apart.data").stat().st_size
    assert report.error < 0.1


def test_only_a_draft_lies_beside_the_file_meanwhile(
    cnn: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts of killed processes are removed by the next one; nothing else would be."""
    losses, seen = importlib.import_module("surgeon.onnx.quantization.layer_errors"), list[str]()
    right = losses._watching

    def spy(*args: Any) -> Any:
        seen.extend(file.name for file in tmp_path.iterdir())
        return right(*args)

    monkeypatch.setattr(losses, "_watching", spy)
    quantize(cnn[1], tmp_path / "q.onnx", _batches(), method="dynamic")
    assert seen and all(name.startswith(".surgeon-") for name in seen)
    assert [file.name for file in tmp_path.iterdir()] == ["q.onnx"]
