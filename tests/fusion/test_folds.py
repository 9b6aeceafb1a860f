"""Every kind of fold is exact to float64 rounding, is counted, and is refused where it would not be exact."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.errors import FuseError, MendError
from surgeon.fusion.fold import counted
from surgeon.fusion.fuse import folds, fuse
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit


def _random(model: nn.Module) -> nn.Module:
    """float64, eval mode, every tensor far from what it is initialised to."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.2
            if not name.endswith("running_var"):
                tensor.data.mul_(torch.randn(tensor.shape, generator=generator).sign())
    return model.double().eval()


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gap(model: nn.Module, fused: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected, found = model(x), fused(x)
    return float((found - expected).abs().max() / expected.abs().max())


class _Code(nn.Module):
    """Layers a and b, a norm, per-channel constants; wired by `how`."""

    def __init__(
        self,
        how: Callable[[_Code, Tensor], Tensor],
        a: nn.Module,
        b: nn.Module | None = None,
        **tensors: Tensor,
    ) -> None:
        super().__init__()
        self.how, self.a, self.b = how, a, b
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class _Scale(nn.Module):
    """Layer scale as a module of its own, as in vision transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Frozen(nn.Module):
    """A batch norm of buffers, computed by hand, as detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class _HandNorm(nn.Module):
    """A LayerNorm written by hand, whose summand is called `bias`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


class _NormAct(nn.BatchNorm2d):
    """A subclass that does more than to normalise."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return F.relu(y)


def _conv(into: int = 4, out: int = 4, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, **{"padding": size // 2, **options})  # type: ignore[arg-type]  # options of Conv2d


class _Block(nn.Module):
    """RepVGG's block: 3x3, 1x1 and identity, each with a norm."""

    def __init__(self, groups: int = 1, in_place: bool = False) -> None:
        super().__init__()
        self.wide = nn.Sequential(_conv(bias=False, groups=groups), nn.BatchNorm2d(4))
        self.point = nn.Sequential(_conv(size=1, bias=False, groups=groups), nn.BatchNorm2d(4))
        self.norm, self.in_place = nn.BatchNorm2d(4), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        if self.in_place:
            y += self.point(x)
        else:
            y = self.point(x) + y
        return F.relu(y + self.norm(x))


class _List(nn.Module):
    """Branches in a list that are summed in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_conv(size=1), _conv(size=5), _conv(size=3, dilation=2, padding=2)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]  # there is more than one


def _tokens(model: _Code, x: Tensor) -> Tensor:
    """ConvNeXt: a linear layer over the last dim, back to channels first, layer scale in forward,
    residual.
    """
    return x + model.gamma * model.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_IMAGE = (2, 4, 6, 6)
_FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "conv, norm, scale": (
        lambda: _Code(lambda m, x: m.b(m.a(x)) * m.s, _conv(), nn.BatchNorm2d(4), s=torch.ones(4, 1, 1)),
        _IMAGE,
        {"conv-bn": 1, "conv-scale": 1},
    ),
    "norm computed by hand": (
        lambda: nn.Sequential(_conv(), _Frozen(4)),
        _IMAGE,
        {"conv-scale": 1, "conv-shift": 1},
    ),
    "norm of a subclass": (lambda: nn.Sequential(_conv(), _NormAct(4)), _IMAGE, {"conv-bn": 1}),
    "linear, layer scale": (
        lambda: nn.Sequential(nn.Linear(4, 6), _Scale(6)),
        (2, 5, 4),
        {"linear-scale": 1},
    ),
    "layer scale through a permutation": (
        lambda: _Code(_tokens, nn.Linear(4, 4), gamma=torch.ones(4, 1, 1)),
        _IMAGE,
        {"linear-scale": 1},
    ),
    "transposed conv, shift": (
        lambda: _Code(
            lambda m, x: m.s + m.a(x), nn.ConvTranspose2d(4, 6, 3, groups=2), s=torch.ones(6, 1, 1)
        ),
        _IMAGE,
        {"conv-shift": 1},
    ),
    "numbers": (
        lambda: _Code(lambda m, x: 3 - m.a(x).mul_(0.5) / 7, nn.Linear(4, 6)),
        (2, 4),
        {"linear-scale": 2, "linear-shift": 1},
    ),
    "two constants in one forward": (
        lambda: _Code(
            lambda m, x: m.b((m.a(x) * m.s + m.t).relu()) * m.t,
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            s=torch.ones(6),
            t=torch.ones(6),
        ),
        (2, 4),
        {"linear-scale": 2, "linear-shift": 1},
    ),
    "subtracted": (
        lambda: _Code(lambda m, x: m.s - m.a(x), nn.Linear(4, 6), s=torch.ones(6)),
        (2, 4),
        {"linear-shift": 1},
    ),
    "norm before a conv": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), _conv(padding=0, groups=2)),
        _IMAGE,
        {"bn-conv": 1},
    ),
    "norm before a linear layer": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)),
        (5, 4),
        {"bn-linear": 1},
    ),
    "norm, flatten, linear": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        _IMAGE,
        {"bn-linear": 1},
    ),
    "scale before a padded conv": (
        lambda: _Code(lambda m, x: m.a(x * m.s), _conv(), s=torch.ones(4, 1, 1)),
        _IMAGE,
        {"scale-conv": 1},
    ),
    "scale before a transposed conv": (
        lambda: _Code(
            lambda m, x: m.a(x * m.s), nn.ConvTranspose2d(4, 6, 3, groups=2), s=torch.ones(4, 1, 1)
        ),
        _IMAGE,
        {"scale-conv": 1},
    ),
    "LayerNorm by hand before a linear layer": (
        lambda: nn.Sequential(_HandNorm(4), nn.Linear(4, 6, bias=False)),
        (2, 5, 4),
        {"shift-linear": 1, "scale-linear": 1},
    ),
    "linear, linear": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=False)),
        (2, 5, 6),
        {"linear-linear": 1},
    ),
    "conv, pointwise": (
        lambda: nn.Sequential(_conv(4, 8, stride=2), _conv(8, 3, 1)),
        _IMAGE,
        {"conv-conv": 1},
    ),
    "RepVGG": (_Block, _IMAGE, {"conv-bn": 2, "parallel": 2}),
    "RepVGG, grouped": (lambda: _Block(2), _IMAGE, {"conv-bn": 2, "parallel": 2}),
    "RepVGG, in place": (lambda: _Block(2, True), _IMAGE, {"conv-bn": 2, "parallel": 2}),
    "branches in a list": (_List, _IMAGE, {"conv-shift": 1, "parallel": 2}),
    "conv and its input": (
        lambda: _Code(lambda m, x: m.b(x + m.a(x)), _conv(), nn.ReLU()),
        _IMAGE,
        {"parallel": 1},
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(), nn.Linear(4, 6), nn.AlphaDropout()),
        (2, 4),
        {"dropout": 2},
    ),
}


@pytest.mark.parametrize("case", _FOLDED)
def test_exact_and_counted(case: str) -> None:
    build, shape, counts = _FOLDED[case]
    model, x = _random(build()), _input(*shape)
    fused = fuse(model, x)
    report = folds(fused)
    assert report is not None and report.counts == counts and folds(model) is None
    assert _gap(model, fused, x) < 1e-12
    assert type(fused).__qualname__ == type(model).__qualname__ and isinstance(fused, type(model))
    before, after = counted(capture(model, x)), counted(capture(fused, x))
    assert sum(before.values()) - sum(after.values()) == sum(
        (2 if kind == "parallel" and case != "conv and its input" else 1) * n
        for kind, n in counts.items()
        if kind != "dropout"
    )
    assert folds(fuse(fused, x)) is not None and not folds(fuse(fused, x)).folds  # type: ignore[union-attr]  # checked


def test_the_report_names_layers_and_what_left() -> None:
    report = folds(fuse(_random(_Block()), _input(*_IMAGE)))
    assert report is not None and str(report) == "2 conv-bn, 2 parallel"
    assert [(f.kind, f.layer, f.gone) for f in report.folds] == [
        ("conv-bn", "wide.0", "wide.1"),
        ("conv-bn", "point.0", "point.1"),
        ("parallel", "wide.0", "point.0"),
        ("parallel", "wide.0", "norm"),
    ]


def test_a_folded_norm_of_a_subclass_keeps_no_parameters() -> None:
    model = _random(nn.Sequential(_conv(bias=False), _NormAct(4)))
    fused = fuse(model, _input(*_IMAGE))
    assert [name for name, _ in fused.named_parameters()] == ["0.weight", "0.bias"] and len(
        list(model.parameters())
    ) == 3


def test_merged_convolution_is_the_only_one_left() -> None:
    model, x = _random(_Block()), _input(*_IMAGE)
    fused = fuse(model, x)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert sum(p.numel() for p in fused.parameters()) == 4 * 4 * 9 + 4


def test_a_fused_model_copies_and_pickles() -> None:
    for build, shape in ((_Block, _IMAGE), (lambda: nn.Sequential(_conv(), _NormAct(4)), _IMAGE)):
        fused, x = fuse(_random(build()), _input(*shape)), _input(*shape)
        again = pickle.load(io.BytesIO(pickle.dumps(fused)))
        for other in (copy.deepcopy(fused), again):
            assert torch.equal(other(x), fused(x)) and folds(other) == folds(fused)


def _twice(m: _Code, x: Tensor) -> Tensor:
    y = m.a(x)
    return y * m.s + y


_REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scale of another dim": (lambda: _Code(lambda m, x: m.a(x) * m.s, _conv(), s=torch.ones(6)), _IMAGE),
    "scale of every entry": (
        lambda: _Code(lambda m, x: m.a(x) * m.s, nn.Linear(4, 6), s=torch.ones(5, 6)),
        (5, 4),
    ),
    "scale that widens": (lambda: _Code(lambda m, x: m.a(x) * m.s, nn.Linear(4, 1), s=torch.ones(5)), (5, 4)),
    "scale from the input": (lambda: _Code(lambda m, x: m.a(x) * x.mean(), nn.Linear(4, 6)), (5, 4)),
    "output read twice": (lambda: _Code(_twice, nn.Linear(4, 6), s=torch.ones(6)), (5, 4)),
    "activation in between": (
        lambda: _Code(lambda m, x: m.a(x).relu() * m.s, nn.Linear(4, 6), s=torch.ones(6)),
        (5, 4),
    ),
    "a number over the layer": (
        lambda: _Code(lambda m, x: m.s / m.a(x), nn.Linear(4, 6), s=torch.ones(6)),
        (5, 4),
    ),
    "norm before a padded conv": (lambda: nn.Sequential(nn.BatchNorm2d(4), _conv()), _IMAGE),
    "norm before a transposed conv": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3)),
        _IMAGE,
    ),
    "norm before a conv that pads by itself": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), _conv(padding_mode="reflect")),
        _IMAGE,
    ),
    "norm read twice": (
        lambda: _Code(lambda m, x: m.a(m.b(x)) + m.b(x).sum(), _conv(padding=0, size=1), nn.BatchNorm2d(4)),
        _IMAGE,
    ),
    "linear layers with a narrow middle": (lambda: nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), (5, 6)),
    "linear layers with a view between": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(12, 3)),
        (5, 2, 4),
    ),
    "conv, padded pointwise": (lambda: nn.Sequential(_conv(4, 8), _conv(8, 3, 1, padding=1)), _IMAGE),
    "conv, wide conv": (lambda: nn.Sequential(_conv(4, 8, 1), _conv(8, 3)), _IMAGE),
    "branches of other inputs": (
        lambda: _Code(lambda m, x: m.a(x) + m.b(x.relu()), _conv(), _conv(size=1)),
        _IMAGE,
    ),
    "branches of other strides": (
        lambda: _Code(
            lambda m, x: m.a(x) + m.b(x), _conv(padding=1, stride=2), _conv(size=1, stride=3, padding=2)
        ),
        (2, 4, 5, 5),
    ),
    "branches off the grid": (
        lambda: _Code(lambda m, x: m.a(x) + m.b(x), _conv(dilation=2, padding=2), _conv(size=3, padding=1)),
        _IMAGE,
    ),
    "branches of other groups": (
        lambda: _Code(lambda m, x: m.a(x) + m.b(x), _conv(), _conv(size=1, groups=2)),
        _IMAGE,
    ),
    "branch with other padding": (
        lambda: _Code(lambda m, x: m.a(x) + m.b(x), _conv(), _conv(padding_mode="circular")),
        _IMAGE,
    ),
    "weighted sum": (
        lambda: _Code(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), _conv(), _conv(size=1)),
        _IMAGE,
    ),
    "branch read twice": (
        lambda: _Code(lambda m, x: (lambda y: y + m.b(x) + y.relu())(m.a(x)), _conv(), _conv(size=1)),
        _IMAGE,
    ),
    "input added in place": (
        lambda: _Code(lambda m, x: (lambda y: y.add_(m.a(y)) + y)(x.relu()), _conv()),
        _IMAGE,
    ),
    "code that cannot be traced": (
        lambda: _Code(lambda m, x: m.a(x) * m.s if x.sum() < 1e9 else x, nn.Linear(4, 6), s=torch.ones(6)),
        (5, 4),
    ),
    "two calls that may be meant": (
        lambda: _Code(lambda m, x: m.a(x).mul(2) + x.mul(2).sum(), nn.Linear(4, 6)),
        (5, 4),
    ),
    "active dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout().train()), (2, 4)),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_refused(case: str) -> None:
    build, shape = _REFUSED[case]
    model, x = _random(build()), _input(*shape)
    if case == "active dropout":
        model[1].train()  # type: ignore[index,union-attr]  # a Sequential
    fused = fuse(model, x)
    report = folds(fused)
    assert report is not None and report.folds == () and str(report) == "nothing to fold"
    with torch.no_grad():
        torch.manual_seed(0)
        expected = copy.deepcopy(model)(x)
        torch.manual_seed(0)
        assert torch.equal(fused(x), expected)


def test_a_norm_without_a_shift_may_stand_before_padding() -> None:
    model, x = _random(nn.Sequential(nn.BatchNorm2d(4), _conv())), _input(*_IMAGE)
    model[0].running_mean.zero_()  # type: ignore[operator,index]  # a tensor
    model[0].bias.data.zero_()  # type: ignore[index]  # a parameter
    fused = fuse(model, x)
    assert _gap(model, fused, x) < 1e-12 and folds(fused).counts == {"bn-conv": 1}  # type: ignore[union-attr]  # it has one


def test_a_copy_that_computes_something_else_is_refused() -> None:
    class Sly(nn.Module):
        """Its result hangs on whether a norm is there, which the ops do not show."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = _conv(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            shift = 1.0 if isinstance(self.norm, nn.BatchNorm2d) else 2.0
            return self.norm(self.conv(x)).relu() + shift

    with pytest.raises(FuseError, match="computes something else"):
        fuse(_random(Sly()), _input(*_IMAGE))


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(FuseError, match="meta"):
        fuse(nn.Linear(2, 2, device="meta").eval(), torch.randn(1, 2))


def test_a_call_that_is_not_there_cannot_be_left_out() -> None:
    with pytest.raises(MendError, match=r"leave out mul:3:0\.1"):
        apply_edit(_Scale(3), Edit("", "operand", "mul:3:0.1"))
