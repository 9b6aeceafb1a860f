"""fuse folds exactly what it says it folds, to float64 rounding, and touches nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from surgeon.errors import FuseError
from surgeon.fusion.fuse import fusable_pairs, fuse

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _random(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval mode, with batch norms far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data = torch.randn(tensor.shape, generator=generator)
            if module.running_var is not None:
                module.running_var.uniform_(0.1, 3.0, generator=generator)
    return model.double().eval()


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def _relative(model: nn.Module, fused: nn.Module, x: Tensor) -> float:
    expected, found = model(x), fused(x)
    return float((found - expected).abs().max() / expected.abs().max())


_FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)), (2, 3, 9)),
    "conv2d without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)),
        (2, 3, 7, 7),
    ),
    "conv2d grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6)),
        (2, 4, 7, 7),
    ),
    "conv2d circular": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(5)),
        (2, 3, 7, 7),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5)), (2, 2, 5, 5, 5)),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 5)),
    "transposed 2d, groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "transposed 2d, depthwise, square": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)),
        (2, 6, 5, 5),
    ),
    "transposed 3d, groups": (
        lambda: nn.Sequential(nn.ConvTranspose3d(4, 8, 2, groups=4), nn.BatchNorm3d(8)),
        (2, 4, 3, 3, 3),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (5, 4)),
    "norm without affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False, eps=0.1)),
        (2, 3, 7, 7),
    ),
}


@pytest.mark.parametrize("case", _FOLDED)
def test_folded_exactly(case: str) -> None:
    build, shape = _FOLDED[case]
    torch.manual_seed(0)
    model, x = _random(build()), _input(*shape)
    before = copy.deepcopy(model.state_dict())
    assert fusable_pairs(model, x) == [("0", "1")]
    fused = fuse(model, x)
    assert isinstance(fused[1], nn.Identity) and not fused[1].training
    assert fused[0].bias is not None and fused[0].weight.dtype == torch.float64
    assert _relative(model, fused, x) < 1e-14
    assert isinstance(model[1], _BATCH_NORMS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_folded_in_the_dtype_of_the_weight() -> None:
    model, x = _random(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))), _input(2, 3, 7, 7)
    single = copy.deepcopy(model).float()
    fused = fuse(single, x.float())
    assert fused[0].weight.dtype == fused[0].bias.dtype == torch.float32
    exact = fuse(copy.deepcopy(single).double(), x)  # the same float32 values, folded in float64
    assert torch.equal(fused[0].weight, exact[0].weight.float())
    assert torch.equal(fused[0].bias, exact[0].bias.float())


class _Apart(nn.Module):
    """The layers and the norms live in different submodules and are registered in another order than they
    run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"b": nn.BatchNorm2d(5), "a": nn.BatchNorm2d(5)})
        self.body = nn.ModuleList([nn.Conv2d(5, 5, 1), nn.Conv2d(3, 5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms["a"](self.body[1](x)).relu_()
        return self.norms["b"](self.body[0](x))


def test_pairs_follow_the_graph() -> None:
    model, x = _random(_Apart()), _input(2, 3, 6, 6)
    assert fusable_pairs(model, x) == [("body.1", "norms.a"), ("body.0", "norms.b")]
    fused = fuse(model, x)
    assert not any(isinstance(module, _BATCH_NORMS) for module in fused.modules())
    assert _relative(model, fused, x) < 1e-14


class _Wired(nn.Module):
    """A conv and a norm of equal width, wired by `how`."""

    def __init__(self, how: Callable[[_Wired, Tensor], Tensor], **norm: object) -> None:
        super().__init__()
        self.how = how
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4, **norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def _plain(m: _Wired, x: Tensor) -> Tensor:
    return m.norm(m.conv(x))


def _read_twice(m: _Wired, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y


def _tied(name: str) -> nn.Module:
    model = _Wired(lambda m, x: m.norm(m.conv(m.other(x))))
    setattr(model.other, name, getattr(model.conv, name))
    return model


def _tied_asleep() -> nn.Module:
    model = _Wired(_plain)
    model.other.weight = (
        model.conv.weight
    )  # `other` does not run on this path, but its weight must not change
    return model


def _storage() -> nn.Module:
    model = _Wired(lambda m, x: m.norm(m.conv(m.other(x)))).double()
    model.other.weight = nn.Parameter(
        model.conv.weight.detach().view(4, 4, 1, 1)
    )  # another object, the same memory
    return model


def _hooked(name: str) -> nn.Module:
    model = _Wired(_plain)
    getattr(model, name).register_forward_hook(lambda module, args, out: out * 1.5)
    return model


def _parametrized() -> nn.Module:
    model = _Wired(_plain)
    weight_norm(model.conv)
    return model


def _training_norm() -> nn.Module:
    model = _random(_Wired(_plain))
    model.norm.train()
    return model


class _Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _subclass() -> nn.Module:
    model = _Wired(_plain)
    model.norm = _Doubled(4)
    return model


_LEFT: dict[str, Callable[[], nn.Module]] = {
    "conv used twice": lambda: _Wired(lambda m, x: m.norm(m.conv(m.conv(x)))),
    "conv read twice": lambda: _Wired(_read_twice),
    "conv weight read elsewhere": lambda: _Wired(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum()),
    "norm used twice": lambda: _Wired(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x))),
    "op in between": lambda: _Wired(lambda m, x: m.norm(m.conv(x).relu())),
    "functional conv": lambda: _Wired(lambda m, x: m.norm(nn.functional.conv2d(x, m.conv.weight))),
    "tied weight": lambda: _tied("weight"),
    "tied bias": lambda: _tied("bias"),
    "tied to a layer that does not run": _tied_asleep,
    "hook on conv": lambda: _hooked("conv"),
    "hook on norm": lambda: _hooked("norm"),
    "parametrized": _parametrized,
    "instance statistics": lambda: _Wired(_plain, track_running_stats=False),
    "norm in training mode": _training_norm,
    "subclass with its own forward": _subclass,
}


@pytest.mark.parametrize("case", _LEFT)
def test_left_alone(case: str) -> None:
    torch.manual_seed(0)
    model, x = _LEFT[case](), _input(2, 4, 3, 3)
    model = model if case == "norm in training mode" else _random(model)
    assert fusable_pairs(model, x) == []
    fused = fuse(model, x)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(fused)(x), copy.deepcopy(model)(x))


def test_shared_memory_is_not_written_through() -> None:
    """A deep copy has memory of its own for each parameter, so that the copy may be folded; the original
    stays as it is.
    """
    model, x = _random(_storage()), _input(2, 4, 3, 3)
    before = copy.deepcopy(model.state_dict())
    assert fusable_pairs(model, x) == []
    assert _relative(model, fuse(model, x), x) < 1e-14
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_norm_used_twice_does_not_stop_another_pair() -> None:
    model = _random(
        nn.Sequential(_Wired(lambda m, x: m.norm(m.norm(m.conv(x)))), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )
    x = _input(2, 4, 3, 3)
    assert fusable_pairs(model, x) == [("1", "2")]
    assert _relative(model, fuse(model, x), x) < 1e-14


def test_linear_with_a_norm_over_another_dim_is_left_alone() -> None:
    model, x = (
        _random(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))),
        _input(2, 4, 3),
    )  # dim 1 has size 4 as well
    assert fusable_pairs(model, x) == []
    assert torch.equal(fuse(model, x)(x), model(x))


def test_training_mode_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train(), torch.randn(2, 4, 3, 3)
    for function in (fuse, fusable_pairs):
        with pytest.raises(FuseError, match=r"model\.eval\(\)"):
            function(model, x)
    assert model[1].training


def test_a_norm_held_in_a_plain_list_is_refused() -> None:
    model = _random(_Wired(lambda m, x: m.hidden[0](m.conv(x))))
    model.hidden = [model.norm]
    with pytest.raises(FuseError, match="outside the module tree"):
        fuse(model, _input(2, 4, 3, 3))


def test_a_norm_whose_attributes_are_read_is_refused() -> None:
    model = _random(_Wired(lambda m, x: m.norm(m.conv(x)) / m.norm.num_features))
    with pytest.raises(FuseError, match="num_features"):
        fuse(model, _input(2, 4, 3, 3))


def test_a_fold_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(0.0)
    model[1].weight.data.fill_(6e4)
    with pytest.raises(FuseError, match=r"not finite in torch\.float16"):
        fuse(model.half(), torch.randn(2, 4, 3, 3).half())


def test_frozen_weights_stay_frozen() -> None:
    model = _random(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))).requires_grad_(False)
    fused = fuse(model, _input(2, 4, 3, 3))
    assert not fused[0].weight.requires_grad and not fused[0].bias.requires_grad
