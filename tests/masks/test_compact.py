"""compact: what masks and zeros have switched off leaves, nothing else does, and outputs stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import surgeon
from surgeon.errors import InputError, NothingRemovedWarning

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with and without padding and biases, batch norms, a linear head."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.b2 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.c3 = nn.Conv2d(24, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b1(self.c1(x)))
        x = self.act(self.b2(self.c2(x)))
        x = self.act(self.c3(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]  # torch's


def make(act: Callable[[Tensor], Tensor] = F.relu) -> Net:
    torch.manual_seed(0)
    model = Net(act).eval()
    with torch.no_grad():
        for norm in (model.b1, model.b2):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.normal_()  # type: ignore[union-attr, operator]  # a buffer
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]  # a buffer
    return model


def same(model: nn.Module, small: nn.Module, x: Tensor = X, within: float = 1e-9) -> None:
    """In float64, on inputs that nobody saw, of another size."""
    with torch.no_grad():
        other = torch.randn(3, *x.shape[1:-2], 17, 19, dtype=torch.float64) if x.dim() == 4 else x.double()
        want, got = model.double()(other), small.double()(other)
    model.float(), small.float()
    assert (want - got).abs().max() <= within * want.abs().max()


def widths(model: Net) -> list[int]:
    return [model.c1.out_channels, model.c2.out_channels, model.c3.out_channels]


@pytest.mark.parametrize("amount", [0.25, 0.5])
@pytest.mark.parametrize("dim", [0, 1])
def test_structured_masks(amount: float, dim: int) -> None:
    model = make()
    for layer in (model.c1, model.c2, model.c3)[dim:]:
        prune.ln_structured(layer, "weight", amount, n=2, dim=dim)
    found = surgeon.compact(model, X)
    same(model, found.model, within=1e-6)  # biases were rounded to float32
    assert found.error <= 1e-9
    assert prune.is_pruned(model)
    if dim == 1:  # columns: what they read is not needed
        assert widths(found.model) == [round(16 * (1 - amount)), round(24 * (1 - amount)), 12]  # type: ignore[arg-type]  # a Net
        assert not prune.is_pruned(found.model) and not found.kept and not found.masked
    else:
        assert widths(found.model)[2] == round(12 * (1 - amount))  # type: ignore[arg-type]  # a Net
        padded = [kept for kept in found.kept if kept.group == "c2.weight[0]"]
        assert all("zero padding" in kept.why for kept in padded)
        gone = found.removed["c2.weight[0]"][0] + sum(kept.channels for kept in padded)
        assert gone == round(24 * amount)  # those behind a beta above zero stay: c3 pads with zeros
        assert padded and ("c2.weight" in found.masked)


def test_constants_are_folded_where_that_is_exact() -> None:
    """Behind a beta above zero a masked filter gives a constant: c2 has no padding, so the mean of its norm takes it over."""
    model = make()
    prune.ln_structured(model.c1, "weight", 0.5, n=2, dim=0)
    found = surgeon.compact(model, X)
    assert found.removed == {"c1.weight[0]": (8, 16)}
    assert [fold.tensor for fold in found.folded] == ["b2.running_mean"] and found.folded[0].channels > 0
    same(model, found.model, within=1e-6)
    assert "b2.running_mean takes over" in str(found) and "c1.weight[0]: 8 of 16" in str(found)


@pytest.mark.parametrize("act", [F.relu, F.gelu, torch.sigmoid, F.hardswish, torch.tanh])
def test_network_slimming(act: Callable[[Tensor], Tensor]) -> None:
    """Scales of zero: the channel is the activation of beta."""
    model = make(act)
    with torch.no_grad():
        model.b1.weight[::2] = 0
        model.b2.weight[::3] = 0
        model.b2.bias[::6] = 0
    found = surgeon.compact(model, X)
    same(model, found.model, within=1e-6)
    assert found.removed["c1.weight[0]"][0] == 8
    zero_at_zero = act is not torch.sigmoid
    expected = 4 if zero_at_zero else 0
    if act is F.relu:  # and those whose beta is below zero
        expected = int((model.b2.bias[::3] <= 0).sum())
    if act is F.hardswish:
        expected = int((F.hardswish(model.b2.bias[::3]) == 0).sum())
    assert found.removed.get("c2.weight[0]", (0, 24))[0] == expected
    assert sum(kept.channels for kept in found.kept) == 8 - expected


def _tiny_weight(model: Net) -> None:
    model.c1.weight[0] = 0
    model.c1.weight[0, 0, 0, 0] = 1e-30


def _dead_for_now(model: Net) -> None:
    """An activation that is zero for all inputs of a usual size, and not for others."""
    model.b1.bias[0] = -1e4


def _tiny_scale(model: Net) -> None:
    model.b1.weight[0] = 1e-30


def _tiny_reader(model: Net) -> None:
    model.c2.weight[:, 0] = 0
    model.c2.weight[3, 0] = 1e-30


@pytest.mark.parametrize("plant", [_tiny_weight, _dead_for_now, _tiny_scale, _tiny_reader])
def test_what_carries_a_signal_stays(plant: Callable[[Net], None]) -> None:
    model = make()
    with torch.no_grad():
        plant(model)
        model.c2.weight[1] = 0  # something that may leave
        model.b2.weight[1], model.b2.bias[1] = 0, -1
    found = surgeon.compact(model, X)
    assert found.model.c1.out_channels == 16  # type: ignore[union-attr]  # a Net
    assert found.removed == {"c2.weight[0]": (1, 24)}


class Gated(nn.Module):
    """Two ways to one channel, one of them a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * torch.sigmoid(self.gate(x)))  # type: ignore[no-any-return]  # torch's


def test_gates() -> None:
    """A gate of zeros is half open, so its channel stays; behind a filter of zeros (and no bias) nothing is left of it."""
    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        for number in (0, 1):
            model.gate.weight[number] = model.gate.bias[number] = 0  # type: ignore[index]  # it has one
        model.first.weight[5] = model.first.bias[5] = 0  # type: ignore[index]  # it has one
        model.gate.weight[6] = model.first.weight[6] = (
            0  # a constant times a constant: the bias of `last` takes it over
        )
    found = surgeon.compact(model, X)
    assert found.model.first.out_channels == 6  # type: ignore[union-attr]  # a Gated
    assert [(fold.tensor, fold.channels) for fold in found.folded] == [("last.bias", 1)]
    same(model, found.model, within=1e-6)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x[:, :, 1:-1, 1:-1] + self.outer(F.relu(self.inner(x))))  # type: ignore[no-any-return]  # torch's


def test_a_stream_loses_what_all_its_writers_leave_out() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.stem.weight[:4] = model.stem.bias[:4] = 0  # type: ignore[index]  # it has one
        model.outer.weight[2:6] = model.outer.bias[2:6] = 0  # type: ignore[index]  # it has one
    found = surgeon.compact(model, X)
    assert found.removed == {"stem.weight[0]": (2, 8)}
    same(model, found.model)


class Attention(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.qkv, self.out = nn.Linear(16, 3 * 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, 16))  # type: ignore[no-any-return]  # torch's


@pytest.mark.parametrize("silent", ["values", "output"])
def test_heads(silent: str) -> None:
    """A head leaves whose values are zero, or that nothing reads; queries of zeros are no reason."""
    torch.manual_seed(0)
    model = Attention().eval()
    with torch.no_grad():
        if silent == "values":
            model.qkv.weight[32:36] = model.qkv.bias[32:36] = 0
        else:
            model.out.weight[:, :4] = 0
        model.qkv.weight[8:12] = model.qkv.bias[8:12] = 0  # queries of another head: it attends evenly
    x = torch.randn(2, 6, 16)
    found = surgeon.compact(model, x)
    assert found.model.qkv.out_features == 36 and found.model.out.in_features == 12  # type: ignore[union-attr]  # an Attention
    same(model, found.model, x)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))  # type: ignore[no-any-return]  # torch's


def test_what_a_norm_counts_stays() -> None:
    model = Normed().eval()
    with torch.no_grad():
        model.first.weight[:3] = model.first.bias[:3] = 0
    with pytest.warns(NothingRemovedWarning):
        found = surgeon.compact(model, torch.randn(2, 8))
    assert not found.removed and found.model.first.out_features == 12  # type: ignore[union-attr]  # a Normed
    assert [(kept.group, kept.channels) for kept in found.kept] == [("first.weight[0]", 3)]
    assert "native_layer_norm counts it" in found.kept[0].why


class LeNet(nn.Module):
    """Of torch's pruning tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, int(x.nelement() / x.shape[0]))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))  # type: ignore[no-any-return]  # torch's


IMAGE = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_tutorial_unstructured() -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    parts = [(getattr(model, name), "weight") for name in ("conv1", "conv2", "fc1", "fc2", "fc3")]
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=0.2)
    with pytest.warns(NothingRemovedWarning, match="no whole channel"):
        found = surgeon.compact(model, IMAGE)
    assert len(found.masked) == 5 and prune.is_pruned(found.model)
    assert found.zeros / found.weights == pytest.approx(0.2, abs=1e-3)
    assert "weights are zero and stay" in str(found)
    with pytest.warns(NothingRemovedWarning):
        settled = surgeon.compact(model, IMAGE, permanent=True)
    assert not prune.is_pruned(settled.model) and not settled.masked and settled.zeros == found.zeros
    with torch.no_grad():
        assert torch.equal(settled.model(IMAGE), model(IMAGE))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("method", ["ln", "random"])
def test_the_tutorial_structured(dim: int, method: str) -> None:
    torch.manual_seed(0)
    model = LeNet().eval()
    for layer in (model.conv2, model.fc2):
        if method == "ln":
            prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=dim)
        else:
            prune.random_structured(layer, "weight", amount=0.5, dim=dim)
    found = surgeon.compact(model, IMAGE)
    small: Any = found.model
    sizes = (
        small.conv1.out_channels,
        small.conv2.out_channels,
        small.fc1.out_features,
        small.fc2.out_features,
    )
    assert sizes == ((6, 8, 120, 42) if dim == 0 else (3, 16, 60, 84))
    with torch.no_grad():
        assert torch.allclose(small(IMAGE), model(IMAGE), atol=1e-6)
    assert not prune.is_pruned(small)


def test_masks_by_name() -> None:
    model = make()
    masks = {
        "c1.weight": torch.ones_like(model.c1.weight),
        "c2.weight": torch.ones(24, 16, 1, 1, dtype=torch.bool),
    }
    masks["c1.weight"][:4] = 0
    masks["c2.weight"][:, 4:8] = False
    found = surgeon.compact(model, X, masks=masks)
    assert found.removed == {"c1.weight[0]": (8, 16)}
    assert bool((model.c1.weight != 0).all())  # the original is not touched
    with torch.no_grad():
        model.c1.weight[:4] = model.c2.weight[:, 4:8] = 0
    same(model, found.model, within=1e-6)


def test_it_saves_loads_and_trains(tmp_path: Path) -> None:
    model = make()
    prune.ln_structured(model.c1, "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(model.fc, "weight", 0.3)
    found = surgeon.compact(model, X)
    small: Any = found.model
    assert found.masked == ("fc.weight",)
    surgeon.save(small, tmp_path / "small")

    def again() -> Net:
        fresh = Net()
        prune.identity(fresh.fc, "weight")
        return fresh

    loaded = surgeon.load(tmp_path / "small", again)
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(X).sum().backward()
    optimizer.step()
    assert int((small.fc.weight == 0).sum()) == round(0.3 * 60)  # the mask holds
    plain = surgeon.compact(model, X, permanent=True)
    surgeon.save(plain.model, tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(surgeon.load(tmp_path / "plain", Net)(X), plain.model(X))
    assert {tuple(p.shape) for p in plain.plan.apply(Net()).parameters()} == {
        tuple(p.shape) for p in plain.model.parameters()
    }


def test_two_calls_of_other_sizes() -> None:
    model = make()
    prune.ln_structured(model.c1, "weight", 0.5, n=2, dim=0)
    calls = surgeon.Calls([X, torch.randn(1, 3, 20, 9)])
    assert surgeon.compact(model, calls).removed == {"c1.weight[0]": (8, 16)}


def _wrong_shape() -> None:
    surgeon.compact(make(), X, masks={"c1.weight": torch.ones(16)})


def _unknown_name() -> None:
    surgeon.compact(make(), X, masks={"c1": torch.ones(16, 3, 3, 3)})


def _no_mask() -> None:
    surgeon.compact(make(), X, masks={"c1.weight": torch.full((16, 3, 3, 3), 0.5)})


def _shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    surgeon.compact(model, torch.randn(2, 4), masks={"0.weight": torch.zeros(4, 4)})


def _everything() -> None:
    model = make()
    surgeon.compact(model, X, masks={"c2.weight": torch.zeros(24, 16, 1, 1)})


def _half_there() -> None:
    model = make()
    prune.l1_unstructured(model.c1, "weight", 0.5)
    model.c1._forward_pre_hooks.clear()
    surgeon.compact(model, X)


def _dense() -> None:
    surgeon.compact(make(), X)


def _swapped() -> None:
    surgeon.compact(X, make())  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (_wrong_shape, r"the mask has shape \(16,\)"),
        (_unknown_name, "has no tensor 'c1'"),
        (_no_mask, "other numbers than 0 and 1"),
        (_shared, "several modules share"),
        (_everything, "hang on no input"),
        (_half_there, "only half there"),
        (_dense, "nothing of this model is zero"),
        (_swapped, "model"),
    ],
)
def test_bad_input(wrong: Callable[[], None], said: str) -> None:
    with pytest.raises(InputError, match=said):
        wrong()


def test_masks_on_what_torchs_attention_reads() -> None:
    """Its output layer is read, not called, so that torch's hook never runs: the weight that it left is what counts."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval()
    for part in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
        prune.ln_structured(part, "weight", 0.5, n=2, dim=0)
    x = torch.randn(2, 5, 16)
    found = surgeon.compact(layer, x)
    assert found.model.linear1.out_features == 12  # type: ignore[union-attr]  # a layer
    with torch.no_grad():
        assert torch.allclose(found.model(x), layer(x), atol=1e-5)
