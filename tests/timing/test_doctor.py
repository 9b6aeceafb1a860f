"""doctor: what it says about ops that ran, on made-up times where times matter; and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.errors import FileError, InputError
from surgeon.onnx.export import export
from surgeon.timing.advice import advice_on
from surgeon.timing.diagnosis import Diagnosis, Layer, remarks_on
from surgeon.timing.doctor import _around, doctor


class _Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.deep = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.body(self.stem(x).relu()).relu()).mean((2, 3)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    for width in (32, 19):
        export(_Net(width), folder / f"{width}.onnx", torch.randn(2, 3, 12, 12))
    return folder


def test_layers_are_named_and_the_fast_path_is_seen(files: Path) -> None:
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    found = doctor(files / "32.onnx", runs=3)
    convs = {layer.name: layer for layer in found.layers if layer.widths is not None}
    assert {name: layer.widths for name, layer in convs.items()} == {
        "stem": (3, 32),
        "body": (32, 32),
        "deep": (32, 32),
    }
    assert all(layer.fast and layer.aligned is None for layer in convs.values())
    assert convs["body"].macs == 32 * 32 * 9 * 8 * 8 and convs["deep"].macs == 32 * 9 * 6 * 6
    assert convs["deep"].waits and not convs["body"].waits
    assert (
        found.before_ms is None
        and found.ms > 0
        and list(found.layers) == sorted(found.layers, key=lambda x: -x.ms)
    )
    assert not any("round_to" in line for line in found.advice)
    odd = doctor(files / "19.onnx", files / "32.onnx", torch.randn(2, 3, 12, 12), runs=3)
    convs = {layer.name: layer for layer in odd.layers if layer.widths is not None}
    low, high = 19 // block * block, -(-19 // block) * block
    assert convs["body"].aligned == ((low, high), (low, high))
    assert any(f"round_to={block}" in line for line in odd.advice)
    assert odd.before_ms is not None and all(layer.before_ms is not None for layer in convs.values())
    assert f"nearest whole blocks {low} or {high}" in " ".join(str(odd).split())


def _layer(name: str, ms: float, **facts: Any) -> Layer:
    return Layer(
        **{"name": name, "op": "Conv", "ms": ms, "before_ms": None, "macs": 10**6, "bytes": 10**4, **facts}
    )


def _found(*layers: Layer, ms: float | None = None) -> list[str]:
    total = sum(layer.ms for layer in layers) if ms is None else ms
    return advice_on(Diagnosis(Path("a"), total, None, 16, layers, ()))


def testadvice_on() -> None:
    fast = _layer("a", 5.0, widths=(32, 32), fast=True)
    odd = _layer("b", 3.0, widths=(19, 32), fast=False, aligned=((16, 32), (32, 32)))
    assert _found(fast) == ["nothing stands out: the time is in products on the fast path; cut more of them"]
    (line,) = _found(fast, odd)
    assert (
        "1 convolutions (38% of the time)" in line
        and "1 of them off the fast path" in line
        and line.endswith("round_to=16")
    )
    (line,) = _found(fast, _layer("c", 4.0, before_ms=4.1), _layer("d", 2.0, before_ms=4.0))
    assert line.endswith("ignore=['c']")
    (line,) = _found(fast, _layer("e", 5.0, op="Mul", macs=0))
    assert line.startswith("50% of the time waits for memory (most of it Mul)")
    (line,) = _found(fast, ms=8.0)
    assert "0 ops of less than 10 us" in line and "take 38%" in line
    assert ["wait" in text for text in _found(fast, odd, _layer("e", 5.0, op="Mul", macs=0))] == [
        True,
        False,
    ]  # the worse first


def test_remarks_and_blocks() -> None:
    assert [_around(width, 16) for width in (3, 16, 19, 40)] == [(3, 16), (16, 16), (16, 32), (32, 48)]
    text = remarks_on(_layer("b", 3.0, before_ms=2.0, fast=False, aligned=((16, 32), (32, 32))))
    assert text == "off the fast path; nearest whole blocks 16 or 32 -> 32; not faster than before"
    assert remarks_on(_layer("x", 1.0, op="ReorderInput", macs=0)) == "puts channels into blocks or back"


def test_bad_input(files: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes((files / "32.onnx").read_bytes()[:3000])
    shapes = ({0: "batch", 2: "height"},)
    export(_Net(8), tmp_path / "open.onnx", torch.randn(2, 3, 12, 12), dynamic_shapes=shapes)
    good = files / "32.onnx"
    bad: list[tuple[str, type[Exception], tuple[Any, ...], dict[str, Any]]] = [
        ("no such file", FileError, (tmp_path / "none.onnx",), {}),
        ("folder", FileError, (tmp_path,), {}),
        ("empty", FileError, (tmp_path / "empty.onnx",), {}),
        ("not an ONNX file", FileError, (tmp_path / "text.onnx",), {}),
        ("not an ONNX file", FileError, (tmp_path / "cut.onnx",), {}),
        ("not an ONNX file", FileError, (good, tmp_path / "text.onnx"), {}),
        ("pass example_inputs", InputError, (tmp_path / "open.onnx",), {}),
        ("does not run", InputError, (good, None, torch.randn(1, 4, 12, 12)), {}),
        ("3 tensors were given", InputError, (good, None, (torch.ones(1),) * 3), {}),
        ("threads is 0", InputError, (good,), {"threads": 0}),
        ("runs is 'x'", InputError, (good,), {"runs": "x"}),
    ]
    for match, kind, args, options in bad:
        with pytest.raises(kind, match=match):
            doctor(*args, **options)
    assert doctor(tmp_path / "open.onnx", example_inputs=torch.randn(1, 3, 20, 12), runs=1).layers
