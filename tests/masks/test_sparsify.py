"""sparsify, sparsity, finalize: torch's own masks, counted right, that hold in training and end in plain weights."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import surgeon
from surgeon.errors import InputError, SurgeonError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]  # torch's


X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PARTS = ("conv", "fc1", "fc2")


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers() if name.endswith("_mask")}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_masks_are_those_of_torch(method: str, scope: str) -> None:
    model, expected = make(), make()
    torch.manual_seed(7)
    parts = [(getattr(expected, name), "weight") for name in PARTS]
    kind = {"l1": prune.L1Unstructured, "random": prune.RandomUnstructured}[method]
    if scope == "global":
        prune.global_unstructured(parts, pruning_method=kind, amount=0.37)
    else:
        for module, name in parts:
            kind.apply(module, name, 0.37)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    small = surgeon.sparsify(model, 0.37, method=method, scope=scope, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    found, wanted = masks(small), masks(expected)
    assert found.keys() == wanted.keys() == {f"{name}.weight_mask" for name in PARTS}
    for name, mask in wanted.items():
        assert torch.equal(found[name], mask), name
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not prune.is_pruned(model)
    with torch.no_grad():
        assert torch.equal(small(X), expected(X))


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "block"])
def test_it_can_be_copied(structure: str) -> None:
    small = surgeon.sparsify(make(), 0.5, structure=structure)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(small)(X), small(X))


def test_amounts_are_of_all() -> None:
    """A second call goes on from the masks of the first one."""
    first = surgeon.sparsify(make(), 0.5)
    second = surgeon.sparsify(first, 0.8)
    for name, mask in masks(first).items():
        assert bool((masks(second)[name][mask == 0] == 0).all())
        assert (masks(second)[name] == 0).sum() == round(0.8 * mask.numel())
    third = surgeon.sparsify(second, 0.3)  # no weight comes back
    assert all(torch.equal(mask, masks(second)[name]) for name, mask in masks(third).items())


def test_two_of_four() -> None:
    model = make()
    small = surgeon.sparsify(model, 0.5, structure="2:4")
    for name in PARTS:
        mask = getattr(small, name).weight_mask.movedim(1, -1)
        fours = mask.reshape(-1, 4)
        assert bool((fours.sum(1) == 2).all())
        weight = getattr(model, name).weight.movedim(1, -1).reshape(-1, 4).abs()
        assert bool(
            (weight[fours == 1].reshape(-1, 2).amin(1) >= weight[fours == 0].reshape(-1, 2).amax(1)).all()
        )


@pytest.mark.parametrize("scope", ["local", "global"])
def test_blocks(scope: str) -> None:
    model = make()
    with torch.no_grad():
        model.fc1.weight[:3, :4] = 1e-3
        model.fc2.weight[2:4, 8:12] = 1e-3
    small = surgeon.sparsify(model, 0.25, structure="block", scope=scope, block=(1, 4))
    for name in PARTS:
        mask = getattr(small, name).weight_mask
        rows = mask.reshape(mask.shape[0], -1, 4, *mask.shape[2:]).flatten(2)
        assert bool((rows == rows[:, :, :1]).all())
    assert not small.fc1.weight_mask[:3, :4].any()  # type: ignore[union-attr, operator, index]  # a buffer
    assert not small.fc2.weight_mask[2:4, 8:12].any()  # type: ignore[union-attr, operator, index]  # a buffer
    assert surgeon.sparsity(small).share == pytest.approx(0.25, abs=18 / 432)  # half of a block with a kernel


def test_methods_that_look_at_data() -> None:
    """Scores by hand, from gradients of the same batches."""
    model, batches = make(), [(X, torch.arange(4)), (X.flip(0), torch.arange(4) % 2)]
    total, square = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, {}
    for x, target in batches:
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad
            square[name] = square.get(name, 0) + parameter.grad.square()
    model.zero_grad()
    for method, scores in (("taylor", total), ("gradient", square)):
        small = surgeon.sparsify(model, 0.5, method=method, data=batches, loss=F.cross_entropy)
        for name in PARTS:
            weight = dict(model.named_parameters())[f"{name}.weight"]
            score: Any = scores[f"{name}.weight"]
            score = (score * weight).abs() if method == "taylor" else score
            mask = getattr(small, name).weight_mask
            assert (mask == 0).sum() == mask.numel() // 2
            assert float(score[mask == 0].max()) <= float(score[mask == 1].min()) * (1 + 1e-4) + 1e-9


def test_a_method_of_ones_own() -> None:
    def last_rows_first(name: str, weight: Tensor) -> Tensor:
        return -torch.arange(weight.shape[0]).reshape(-1, *(1,) * (weight.dim() - 1)).expand(weight.shape)

    small: Any = surgeon.sparsify(make(), 0.5, method=last_rows_first, ignore=["conv"])
    assert small.fc1.weight_mask[:6].all() and not small.fc1.weight_mask[6:].any()
    assert not hasattr(small.conv, "weight_mask")
    found = surgeon.compact(small, X)  # whole rows are neurons
    assert found.model.fc1.out_features == 6  # type: ignore[union-attr]  # a Net


def test_masks_hold_in_training_and_end_in_plain_weights() -> None:
    model = surgeon.sparsify(make(), 0.6)
    train = [(X, torch.arange(4))]
    done = surgeon.finetune(model, train, epochs=3, rate=1e-2)
    assert done.history
    table = surgeon.sparsity(model)
    assert table.share == pytest.approx(0.6, abs=2e-3) and all(layer.masked for layer in table.layers)
    plain = surgeon.finalize(model)
    assert not prune.is_pruned(plain) and prune.is_pruned(model)
    assert plain.state_dict().keys() == make().state_dict().keys()
    assert surgeon.sparsity(plain).zeros == table.zeros
    with torch.no_grad():
        model.eval(), plain.eval()
        assert torch.equal(plain(X), model(X))


def test_the_table() -> None:
    model = make()
    with torch.no_grad():
        model.fc2.weight[:2] = 0
    table = surgeon.sparsity(model)
    layer = next(layer for layer in table.layers if layer.name == "fc2.weight")
    assert (layer.zeros, layer.count, layer.share, layer.masked, layer.size) == (24, 48, 0.5, False, 192)
    assert layer.csr == 24 * (4 + 4) + 5 * 4
    assert layer.compressed == len(zlib.compress(model.fc2.weight.detach().numpy().tobytes(), 6))
    assert table.count == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert "24 of 48" in str(table) and "dense kernels gain nothing" in str(table)


def test_shared_weights_and_embeddings_stay_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.head = (
                nn.Embedding(20, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 20, bias=False),
            )
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.words(ids)))  # type: ignore[no-any-return]  # torch's

    small: Any = surgeon.sparsify(Tied(), 0.5)
    assert masks(small).keys() == {"mix.weight_mask"} and small.head.weight is small.words.weight
    assert surgeon.sparsity(small).count == 20 * 8 + 8 * 8


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: surgeon.sparsify(m, 0), "share in"),
        (lambda m: surgeon.sparsify(m, 1.0), "share in"),
        (lambda m: surgeon.sparsify(m, "half"), "share in"),
        (lambda m: surgeon.sparsify(m, 0.5, method="l3"), "unknown method"),
        (lambda m: surgeon.sparsify(m, 0.5, scope="all"), "unknown scope"),
        (lambda m: surgeon.sparsify(m, 0.5, structure="1:4"), "unknown structure"),
        (lambda m: surgeon.sparsify(m, 0.6, structure="2:4"), "amount is 0.5"),
        (lambda m: surgeon.sparsify(m, 0.5, method="taylor"), "looks at data"),
        (lambda m: surgeon.sparsify(m, 0.5, method="taylor", data=[]), "no batch"),
        (lambda m: surgeon.sparsify(m, 0.5, method=lambda name, weight: weight[0]), "finite number for each"),
        (lambda m: surgeon.sparsify(m, 0.5, ignore=["layer9"]), "layer9"),
        (lambda m: surgeon.sparsify(m, 0.5, structure="block", block=(0, 4)), "positive whole"),
        (lambda m: surgeon.sparsify(nn.ReLU(), 0.5), "no weights"),
        (lambda m: surgeon.sparsify(nn.Linear(6, 4), 0.5, structure="2:4"), "four divides"),
        (lambda m: surgeon.sparsify("model", 0.5), "not a model"),
        (lambda m: surgeon.sparsity(3), "not a model"),
        (lambda m: surgeon.finalize(None), "not a model"),
    ],
)
def test_bad_input(call: Callable[[nn.Module], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call(make())
    assert isinstance(caught.value, SurgeonError)


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((mask == 0).sum()) for name, mask in masks(model).items()}


@pytest.mark.parametrize("method", ["l1", "random"])
def test_second_calls_add_up_to_the_amount(method: str) -> None:
    """Whatever structure the first call had."""
    blocks = surgeon.sparsify(make(), 0.5, structure="block", block=(2, 4), method=method)
    assert surgeon.sparsity(
        surgeon.sparsify(blocks, 0.5, structure="block", block=(2, 4), method=method, seed=3)
    ).zeros == sum(zeros(blocks).values())
    mixed = surgeon.sparsify(
        surgeon.sparsify(make(), 0.3), 0.5, structure="block", block=(2, 4), method=method, scope="global"
    )
    assert surgeon.sparsity(mixed).share == pytest.approx(0.5, abs=36 / 432)
    first = surgeon.sparsify(make(), 0.5, structure="2:4", method=method)
    pattern = surgeon.sparsify(first, 0.5, structure="2:4", method=method, seed=5)
    for mask in masks(pattern).values():
        assert bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all())


def test_ties_and_large_blocks() -> None:
    """Equal scores leave no more than was asked for, and no tensor is emptied."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1)
    assert surgeon.sparsity(surgeon.sparsify(model, 0.5, structure="block")).share == 0.5
    whole = surgeon.sparsify(model, 0.9, structure="block", block=(64, 64))
    assert surgeon.sparsity(whole).zeros == 0


def test_transposed_convolutions_read_along_their_first_dim() -> None:
    layer = nn.ConvTranspose2d(8, 6, 3)
    mask: Any = surgeon.sparsify(nn.Sequential(layer), 0.5, structure="2:4")[0].weight_mask  # type: ignore[index]  # a layer
    assert bool((mask.movedim(0, -1).reshape(-1, 4).sum(1) == 2).all())
    blocks: Any = surgeon.sparsify(nn.Sequential(layer), 0.5, structure="block", block=(1, 8))[0].weight_mask  # type: ignore[index]
    assert bool((blocks == blocks[:1, :, :1, :1]).all())  # a block is all inputs of one output


def test_what_no_mask_would_hold_stays_dense() -> None:
    """The output layer of torch's attention is read, not called; magnitudes of weight_norm are no weights."""
    torch.manual_seed(0)
    layer: Any = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    small: Any = surgeon.sparsify(layer, 0.5)
    assert "self_attn.out_proj.weight_mask" not in masks(small) and "self_attn.in_proj_weight_mask" in masks(
        small
    )
    x = torch.randn(2, 5, 8)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        small(x).square().sum().backward()
        optimizer.step()
    plain = surgeon.finalize(small)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), small.eval()(x), atol=1e-6)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    assert masks(surgeon.sparsify(nn.Sequential(normed), 0.9)).keys() == {
        "0.parametrizations.weight.original1_mask"
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda m: surgeon.sparsify(m, 0.5, structure="block", block=4),
        lambda m: surgeon.sparsify(m, 0.5, seed=None),
        lambda m: surgeon.sparsify(m, 0.5, method="taylor", data=X),
        lambda m: surgeon.sparsify(nn.LazyLinear(4), 0.5),
        lambda m: surgeon.sparsity(nn.LazyLinear(4)),
        lambda m: surgeon.finalize(nn.LazyLinear(4)),
        lambda m: surgeon.sparsify(nn.Linear(4, 4, device="meta"), 0.5),
        lambda m: surgeon.sparsity(nn.Linear(4, 4, device="meta")),
        lambda m: surgeon.compact(nn.Linear(4, 4, device="meta"), torch.randn(2, 4)),
        lambda m: surgeon.compact(m, X, masks=[torch.ones(3)]),
        lambda m: surgeon.sparsity(torch.jit.script(nn.Linear(4, 4))),
    ],
)
def test_odd_input_has_an_error_of_the_family(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(SurgeonError):
        call(make())
    assert surgeon.sparsify(make(), 0.5, ignore=None) is not None  # type: ignore[arg-type]  # on purpose
