"""export's options: fusing, precision, dynamic shapes, names, metadata; and faults that exporters are known
for.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ExportError, InputError, MissingExtraError
from surgeon.fusion.fuse import folds, fuse, plans_of
from surgeon.onnx.compare import relative_error
from surgeon.onnx.export import export


def _cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _initializers(path: Path) -> dict[str, tuple[int, ...]]:
    return {item.name: tuple(item.dims) for item in onnx.load(str(path)).graph.initializer}


def _run(path: Path, *inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(
        None, {item.name: x.numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)}
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.r = kind(8, 16, batch_first=True, **options)
        self.f = nn.LazyLinear(4)
        self(torch.randn(2, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.r(x)[0])


def rows_of(path: Path, *shape: int) -> tuple[int, ...]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, {session.get_inputs()[0].name: torch.randn(shape).numpy()})[0].shape)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_time_of_recurrent_layers_may_stay_open(tmp_path: Path, kind: Any, options: Any) -> None:
    """At each export of a process, not at the first one alone."""
    model, path = Recurrent(kind, **options).eval(), tmp_path / "a.onnx"
    for _ in range(2):
        export(model, path, torch.randn(2, 7, 8), dynamic_shapes=({0: "b", 1: "t"},))
        assert rows_of(path, 1, 12, 8) == (1, 12, 4)
    export(model, path, torch.randn(2, 7, 8), dynamic_shapes=({1: "t"},))
    assert rows_of(path, 2, 5, 8) == (2, 5, 4)


class Nested(nn.Module):
    def forward(self, given: dict[str, Tensor], mask: Tensor) -> Tensor:
        return given["q"] * mask + torch.ones(2, 7, 1)


RNN, Q = Recurrent(nn.RNN), torch.randn(2, 7, 8)
NESTED: Any = {"given": {"q": Q}, "mask": torch.ones(2, 1, 1)}
FIXED: dict[str, tuple[nn.Module, Any, Any, str, str]] = {
    "loop over the time": (RNN, Q, ({0: "b", 1: "t"},), "dim 1 (t) of input 'x'", "dim 0 (b) of input 'x' may stay"),
    "time alone": (RNN, Q, ({1: "t"},), "dim 1 (t) of input 'x'", "leave it out"),
    "by name": (RNN, Q, {"x": {1: "steps"}}, "dim 1 (steps) of input 'x'", "leave it out"),
    "Dim": (RNN, Q, ({1: torch.export.Dim("t", min=2, max=99)},), "dim 1 (t) of input 'x'", "leave it out"),
    "in a tuple": (RNN, Q, ((None, torch.export.Dim.DYNAMIC, None),), "dim 1 of input 'x'", "leave it out"),
    "in a nest": (
        Nested(), NESTED, {"given": {"q": {1: "t"}}, "mask": {}}, "dim 1 (t) of input 'given['q']'", "leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_a_dim_that_the_code_fixes_is_named(tmp_path: Path, case: str) -> None:
    model, inputs, shapes, named, advice = FIXED[case]
    with pytest.raises(ExportError) as caught:
        export(model.eval(), tmp_path / "a.onnx", inputs, dynamic_shapes=shapes)
    said = str(caught.value)
    assert named in said and "7" in said and advice in said and "batch" not in said
    assert [*tmp_path.iterdir()] == []


def test_it_is_fused_unless_told_otherwise(tmp_path: Path) -> None:
    model, x = _cnn(), torch.randn(1, 3, 9, 9)
    report = export(model, tmp_path / "a.onnx", x)
    assert report.folds is not None and report.folds.counts == {"conv-bn": 2}
    assert report.params == sum(p.numel() for p in fuse(model, x).parameters())
    plain = export(model, tmp_path / "b.onnx", x, fuse=False)
    assert plain.folds is None
    again = export(fuse(model, x), tmp_path / "c.onnx", x)
    assert again.folds == report.folds and again.params == report.params
    assert not any(isinstance(m, nn.Identity) for m in model.modules()) and model[2].inplace  # untouched


def test_what_cannot_be_fused_is_said(tmp_path: Path) -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.hidden = [self.norm]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](self.conv(x))

    model = Hidden()
    with pytest.raises(ExportError, match="fuse=False"):
        export(model, tmp_path / "a.onnx", torch.randn(2, 3, 9, 9))
    assert list(tmp_path.iterdir()) == []


def test_metadata_and_macs(tmp_path: Path) -> None:
    model, x = _cnn(), torch.randn(1, 3, 9, 9)
    small = surgeon.shrink(model, 0.5, example_inputs=x, round_to=1)
    macs = surgeon.inspect(small, x).macs
    found = []
    for number, module in enumerate((small, fuse(small.eval(), x))):
        report = export(module, tmp_path / f"{number}.onnx", x)
        found.append({item.key: item.value for item in onnx.load(str(report.path)).metadata_props})
        assert report.macs == macs and found[-1]["surgeon.macs"] == str(macs)
        assert (
            found[-1]["surgeon.params"]
            == str(report.params)
            == str(sum(p.numel() for p in fuse(small, x).parameters()))
        )
    assert found[0] == found[1]
    assert found[0]["surgeon.architecture"] == plans_of(small)[0].hash and len(found[0]["surgeon.plan"]) == 16
    export(model, tmp_path / "whole.onnx", x)
    assert "surgeon.plan" not in {item.key for item in onnx.load(str(tmp_path / "whole.onnx")).metadata_props}


def test_no_source_paths_are_shipped(tmp_path: Path) -> None:
    report = export(_cnn(), tmp_path / "a.onnx", torch.randn(2, 3, 9, 9))
    text = report.path.read_bytes()
    assert b"stack_trace" not in text and b"site-packages" not in text
    assert b"'7'" in text  # the path of the linear layer, for surgeon.doctor


def test_stale_sizes_would_be_seen(tmp_path: Path) -> None:
    """Every tensor of a cut model's file has the cut model's shape."""
    x = torch.randn(1, 3, 9, 9)
    small = surgeon.shrink(_cnn(), 0.5, example_inputs=x, round_to=1)
    fused = fuse(small.eval(), x)
    export(fused, tmp_path / "small.onnx", x)
    shapes = _initializers(tmp_path / "small.onnx")
    own = {name: tuple(p.shape) for name, p in fused.named_parameters()}
    assert own.items() <= shapes.items()
    values = {info.name: info for info in onnx.load(str(tmp_path / "small.onnx")).graph.value_info}
    widths = {dim.dim_value for info in values.values() for dim in info.type.tensor_type.shape.dim[1:2]}
    assert 4 in widths and 8 not in widths  # and so has every activation, 8 before the cut


class _TwoNorms(nn.Module):
    """Two branches that share an input, each a convolution without bias and a norm: exporters have given both
    one bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 4, 1, bias=False) for _ in range(2))
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.na(self.a(x)), self.nb(self.b(x))


@pytest.mark.parametrize("fused", [True, False])
def test_branches_keep_biases_of_their_own(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    model = _TwoNorms().eval()
    for norm in (model.na, model.nb):
        nn.init.normal_(norm.bias, std=5)
        norm.running_mean.normal_()
    x = torch.randn(3, 3, 5, 5)
    try:
        export(model, tmp_path / "two.onnx", x, fuse=fused)
    except ExportError as error:  # an exporter with the fault: the check has caught it
        assert not fused and "computes something else" in error.what
        return
    with torch.no_grad():
        for found, expected in zip(_run(tmp_path / "two.onnx", x), model(x), strict=True):
            assert relative_error(found, expected.numpy()) < 1e-5


def test_one_bias_for_two_branches_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.onnx.ONNXProgram.save

    def colliding(program: Any, path: Path, **options: Any) -> None:
        right(program, path, **options)
        proto = onnx.load(str(path))
        for node in proto.graph.node:
            if node.op_type == "Conv":
                node.input[2] = "a.bias"
        onnx.save(proto, str(path))

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", colliding)
    model = _TwoNorms().eval()
    nn.init.normal_(model.na.bias)
    nn.init.normal_(model.nb.bias)
    with pytest.raises(ExportError, match="computes something else"):
        export(model, tmp_path / "two.onnx", torch.randn(2, 3, 5, 5))
    assert list(tmp_path.iterdir()) == []


class _Pooled(nn.Module):
    """Of a batch of one, `expand` and `squeeze` leave no trace of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(tokens.mean(1))


def test_a_batch_of_one_is_not_baked_in(tmp_path: Path) -> None:
    model, x = _Pooled().eval(), torch.randn(1, 6, 4)
    export(model, tmp_path / "ours.onnx", x)
    many = torch.randn(7, 6, 4)
    with torch.no_grad():
        assert relative_error(_run(tmp_path / "ours.onnx", many)[0], model(many).numpy()) < 1e-5


def test_a_specialised_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that takes the batch for a constant: the file says one size where the batch was to vary."""
    right = torch.onnx.export

    def specialised(model: nn.Module, args: Any, **options: Any) -> Any:
        return right(model, args, **{**options, "dynamic_shapes": None})

    monkeypatch.setattr(torch.onnx, "export", specialised)
    with pytest.raises(ExportError, match="its code fixes the batch size"):
        export(_Pooled().eval(), tmp_path / "a.onnx", torch.randn(2, 6, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "kind", "limit"), [("fp16", "FLOAT16", 1e-2), ("bf16", "BFLOAT16", 1e-4)]
)
def test_low_precision(tmp_path: Path, precision: str, kind: str, limit: float) -> None:
    model, x = _cnn(), torch.randn(1, 3, 9, 9)
    report = export(model, tmp_path / "low.onnx", x, precision=precision)
    whole = export(model, tmp_path / "whole.onnx", x)
    assert 0 < report.error < limit and report.compared == (
        "in float32" if precision == "bf16" else "as it is"
    )
    assert report.params == whole.params and report.size_bytes < whole.size_bytes
    proto = onnx.load(str(report.path))
    wanted = onnx.TensorProto.DataType.Value(kind)
    assert {t.data_type for t in proto.graph.initializer if t.name.endswith(("weight", "bias"))} == {wanted}
    assert proto.graph.input[0].type.tensor_type.elem_type == wanted
    assert next(model.parameters()).dtype is torch.float32
    assert sorted(file.name for file in tmp_path.iterdir()) == ["low.onnx", "whole.onnx"]


def test_a_wrong_bfloat16_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.onnx.ONNXProgram.save

    def wrong(program: Any, path: Path, **options: Any) -> None:
        right(program, path, **options)
        proto = onnx.load(str(path))
        (bias,) = (t for t in proto.graph.initializer if t.name == "7.bias")
        values = np.asarray(onnx.numpy_helper.to_array(bias)).copy()
        values[0] += 1
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(proto, str(path))

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", wrong)
    with pytest.raises(ExportError, match="computes something else"):
        export(_cnn(), tmp_path / "low.onnx", torch.randn(2, 3, 9, 9), precision="bf16")
    assert list(tmp_path.iterdir()) == []


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        hidden = self.embed(ids) * mask[..., None]
        return {"hidden": hidden, "pair": (hidden.sum(1), self.head(hidden.mean(1)))}


def test_names_are_kept_and_named_dims_vary(tmp_path: Path) -> None:
    model = _Words().eval()
    inputs = {"ids": torch.arange(8)[None].expand(2, 8), "mask": torch.rand(2, 8)}
    shapes = {"ids": {0: "batch", 1: "words"}, "mask": {0: "batch", 1: "words"}}
    report = export(model, tmp_path / "words.onnx", inputs, dynamic_shapes=shapes)
    assert report.batch_sizes == (2, 4)  # and 16 words
    graph = onnx.load(str(tmp_path / "words.onnx")).graph
    assert [item.name for item in graph.input] == ["ids", "mask"]
    assert [item.name for item in graph.output] == ["hidden", "pair.0", "pair.1"]
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim] == ["batch", "words"]
    ids, mask = torch.randint(0, 10, (3, 5)), torch.rand(3, 5)
    with torch.no_grad():
        assert (
            relative_error(_run(tmp_path / "words.onnx", ids, mask)[0], model(ids, mask)["hidden"].numpy())
            < 1e-5
        )


def test_a_named_dim_that_the_model_limits_is_compared_where_it_runs(tmp_path: Path) -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.places(torch.arange(x.shape[1]))

    shapes = ({0: "batch", 1: torch.export.Dim("words", max=10)},)
    report = export(Short().eval(), tmp_path / "a.onnx", torch.randn(2, 8, 4), dynamic_shapes=shapes)
    assert report.batch_sizes == (2,)


def test_activations_in_place(tmp_path: Path) -> None:
    """One that forward relies on stays as it is; all are as before afterwards."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            self.act(y)
            return y + 1

    model, x = Reads().eval(), torch.randn(2, 6)
    export(model, tmp_path / "a.onnx", x)
    with torch.no_grad():
        assert relative_error(_run(tmp_path / "a.onnx", x)[0], model(x).numpy()) < 1e-6
    assert model.act.inplace


def test_simplify(tmp_path: Path) -> None:
    model, x = _cnn(), torch.randn(2, 3, 9, 9)
    counts = {}
    for way in (False, True, "onnxslim")[: 3 if importlib.util.find_spec("onnxslim") else 2]:
        report = export(model, tmp_path / f"{way}.onnx", x, simplify=way)
        counts[way] = len(onnx.load(str(report.path)).graph.node)
        assert report.error < 1e-5
    assert counts[True] <= counts[False]
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "True.onnx")).graph.node}
    assert not kinds & {"Identity", "Dropout", "BatchNormalization"}


def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(InputError, match="fp32, fp16, bf16"):
        export(model, tmp_path / "a.onnx", x, precision="int8")
    with pytest.raises(InputError, match="simplify"):
        export(model, tmp_path / "a.onnx", x, simplify="fast")
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    with pytest.raises(MissingExtraError, match=r"surgeon-torch\[deploy\]"):
        export(model, tmp_path / "a.onnx", x, simplify="onnxslim")
    with pytest.raises(ExportError, match=r"could not export|dynamic batch"):
        export(model, tmp_path / "a.onnx", x, dynamic_shapes={"no_such_input": {0: "batch"}})
    with pytest.raises(ExportError, match=r"does not run on the example inputs(.|\n)*fuse=False"):
        export(model, tmp_path / "a.onnx", torch.randn(2, 5))
    with pytest.raises(ExportError, match="could not export"):
        export(model, tmp_path / "a.onnx", torch.randn(2, 5), fuse=False)
    assert list(tmp_path.iterdir()) == []
    assert folds(model) is None


def test_no_folder_is_left_behind(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError):
        export(Odd(), tmp_path / "new" / "folder" / "a.onnx", torch.randn(2, 4, 4))
    assert list(tmp_path.iterdir()) == []
