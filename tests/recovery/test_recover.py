"""Recovery: a refit is the closed-form optimum, errors do not pile up, nothing that hurts is taken, bad input
is refused.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, PlanError
from surgeon.ops.table import op_name
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layerwise import RIDGES
from surgeon.recovery.linear.least_squares import Normal
from surgeon.recovery.norms import reestimate
from surgeon.recovery.options import STRONGER
from surgeon.recovery.recover import recover
from surgeon.recovery.row_sampling import RowSample
from surgeon.recovery.runs.recording import Recording

TINY = (1e-13,)  # a ridge that only breaks ties


class Chain(nn.Module):
    """A layer that loses outputs, a nonlinearity, and the layer whose refit is looked at; float64."""

    def __init__(self, first: nn.Module, between: nn.Module, consumer: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.consumer = first, between, consumer

    def forward(self, x: Tensor) -> Tensor:
        return self.consumer(self.between(self.first(x)))


class ChannelsLast(nn.Module):
    """LayerNorm over the last dim, affine."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x))


LAYERS: dict[str, tuple[Any, Any, Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5, bias=False), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 8), nn.Tanh, lambda: nn.Linear(8, 5), (7, 6)),
    "layer norm in front": (
        lambda: nn.Linear(6, 8),
        lambda: ChannelsLast(8),
        lambda: nn.Linear(8, 5),
        (7, 6),
    ),
    "1x1": (lambda: nn.Conv2d(3, 8, 1), nn.Tanh, lambda: nn.Conv2d(8, 5, 1), (3, 6, 6)),
    "3x3": (lambda: nn.Conv2d(3, 8, 3, padding=1), nn.Tanh, lambda: nn.Conv2d(8, 5, 3, padding=1), (3, 6, 6)),
    "strided": (
        lambda: nn.Conv2d(3, 8, 1),
        nn.Tanh,
        lambda: nn.Conv2d(8, 5, (3, 2), (2, 1), (1, 0), (1, 2)),
        (3, 7, 6),
    ),
    "1d": (lambda: nn.Conv1d(3, 8, 1), nn.Tanh, lambda: nn.Conv1d(8, 5, 3, padding=2, dilation=2), (3, 9)),
    "3d": (lambda: nn.Conv3d(2, 6, 1), nn.Tanh, lambda: nn.Conv3d(6, 4, 2), (2, 4, 4, 3)),
    "grouped": (
        lambda: nn.Conv2d(3, 8, 1),
        nn.Tanh,
        lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
        (3, 5, 5),
    ),
    "transposed": (
        lambda: nn.Conv2d(3, 8, 1),
        nn.Tanh,
        lambda: nn.ConvTranspose2d(8, 5, 3, 2, 1, 1),
        (3, 4, 4),
    ),
    "transposed, grouped": (
        lambda: nn.Conv2d(3, 8, 1),
        nn.Tanh,
        lambda: nn.ConvTranspose2d(8, 4, 3, groups=2),
        (3, 4, 4),
    ),
}


def batches(shape: tuple[int, ...], count: int = 6, size: int = 40, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def brute_force(
    layer: nn.Module, x: Tensor, wanted: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best weight and bias by a design matrix of which every column is the layer with one weight set to
    1; `weights` of the squared errors, as `wanted` is shaped."""
    shape = layer.weight.shape
    bias = layer.bias is not None
    columns = []
    blank = {"weight": torch.zeros_like(layer.weight)} | (
        {"bias": torch.zeros_like(layer.bias)} if bias else {}
    )
    for index in itertools.product(*map(range, shape)):
        one = {name: value.clone() for name, value in blank.items()}
        one["weight"][index] = 1
        columns.append(torch.func.functional_call(layer, one, x).flatten())
    for index in range(len(layer.bias) if bias else 0):
        one = {name: value.clone() for name, value in blank.items()}
        one["bias"][index] = 1
        columns.append(torch.func.functional_call(layer, one, x).flatten())
    root = (
        (torch.ones_like(wanted) if weights is None else weights.expand_as(wanted)).flatten().sqrt()[:, None]
    )
    design, right = torch.stack(columns, 1) * root, wanted.flatten()[:, None] * root
    found = torch.linalg.lstsq(design, right, driver="gelsd").solution[:, 0]
    count = layer.weight.numel()
    return found[:count].reshape(shape), found[count:] if bias else None


@pytest.mark.parametrize("kind", LAYERS)
def test_the_refit_is_the_closed_form_optimum(kind: str) -> None:
    torch.manual_seed(0)
    first, between, consumer, shape = LAYERS[kind]
    model = Chain(first(), between(), consumer()).double().eval()
    data = batches(shape)
    surgery = surgeon.inspect(model, data[0])
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data, steps=("refit",), ridges=TINY)
    assert found.learned == 200 and found.held == 40 and found.steps[0].taken
    learned = torch.cat(data[:-1])
    with torch.no_grad():
        weight, bias = brute_force(small.consumer, small.between(small.first(learned)), model(learned))
    torch.testing.assert_close(found.model.consumer.weight, weight, rtol=1e-8, atol=1e-8)
    if bias is not None:
        torch.testing.assert_close(found.model.consumer.bias, bias, rtol=1e-8, atol=1e-8)
    assert torch.equal(found.model.first.weight, small.first.weight)  # it was exact: nothing to gain
    assert not torch.equal(small.consumer.weight, found.model.consumer.weight), (
        "the small model itself is not touched"
    )


@pytest.mark.parametrize("kind", ["3x3", "strided"])
def test_wide_convolutions_share_one_map_of_channels(kind: str) -> None:
    """Beyond `widest`: the original's weights on the regression of its input channels on those that stay."""
    torch.manual_seed(0)
    first, between, consumer, shape = LAYERS[kind]
    model = Chain(first(), between(), consumer()).double().eval()
    data = batches(shape)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    found = recover(
        small, plan, model, data, steps=("refit",), ridges=TINY, widest=20
    )  # 36 unknowns, 4 channels
    fit = next(fit for fit in found.steps[0].fits if fit.name == "consumer")
    assert fit.taken and found.after < found.before
    x = torch.cat(data[:-1])
    with torch.no_grad():
        given, whole = small.between(small.first(x)), model.between(model.first(x))
        a, y = (v.movedim(1, -1).flatten(0, -2) for v in (given, whole))
        a = a - a.mean(0)
        guess = torch.linalg.lstsq(a, y - y.mean(0)).solution  # [4, 8]
        weight = torch.einsum("oi...,ci->oc...", model.consumer.weight, guess)
        plain = F.conv2d(
            given, weight, None, model.consumer.stride, model.consumer.padding, model.consumer.dilation
        )
        bias = (model(x) - plain).mean((0, 2, 3))
    torch.testing.assert_close(found.model.consumer.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.model.consumer.bias, bias, rtol=1e-8, atol=1e-8)
    narrow = recover(small, plan, model, data, steps=("refit",), ridges=TINY, widest=3)
    assert "unknowns are more than 3" in next(f.skipped for f in narrow.steps[0].fits if f.name == "consumer")


class Blocks(nn.Module):
    """Residual blocks with batch norms, as in ResNets; `late` computes the shortcut after the branch."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for n in (1, 2):
            setattr(self, f"a{n}", nn.Conv2d(8, 8, 3, padding=1, bias=False))
            setattr(self, f"n{n}", nn.BatchNorm2d(8))
            setattr(self, f"b{n}", nn.Conv2d(8, 8, 3, padding=1, bias=False))
            setattr(self, f"m{n}", nn.BatchNorm2d(8))
        self.short = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def branch(self, n: int, x: Tensor) -> Tensor:
        y = F.relu(getattr(self, f"n{n}")(getattr(self, f"a{n}")(x)))
        return getattr(self, f"m{n}")(getattr(self, f"b{n}")(y))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.branch(1, x) + x)
        y = self.branch(2, x) if self.late else None
        z = self.norm(self.short(x))
        y = self.branch(2, x) if y is None else y
        return self.head(F.relu(y + z).mean((2, 3)))


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics and scales of their own, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            held = {
                "weight": (0.5, 1.5),
                "bias": (-0.5, 0.5),
                "running_mean": (-0.3, 0.3),
                "running_var": (0.3, 1.5),
            }
            for name, (low, high) in held.items():
                tensor = getattr(module, name)
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.double().eval()


def weights_of(
    name: str, model: nn.Module, small: nn.Module, plan: surgeon.Plan, data: list[Tensor]
) -> Tensor:
    """What the rows of a convolution weigh, [batches, samples, 1, height, width], if all of them are
    drawn.
    """
    recording = Recording(model, small, [((x,), {}) for x in data], [False] * len(data))
    draw = RowSample(recording, KeptEntries(recording.big, plan), lambda items, _: items)
    site = next(site for site in draw.layers if site.name == name)
    found = [
        torch.empty(len(w), dtype=w.dtype).scatter(0, at, w)
        for at, w in zip(draw.picked[site], draw.weights[site], strict=True)
    ]
    return torch.stack(found).reshape(len(data), len(data[0]), 1, *data[0].shape[2:])


@pytest.mark.parametrize("late", [False, True])
def test_a_block_makes_up_for_what_came_before_it(late: bool) -> None:
    """The last layer before a sum aims at the original's sum less the small model's other summand, through
    its batch norm.
    """
    torch.manual_seed(0)
    model = trained_like(Blocks(late))
    data = batches((3, 6, 6), 5)
    surgery = surgeon.inspect(model, data[0])
    plan = surgery.plan({"*": 0.0, "a1": 0.5, "a2": 0.5}, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data, steps=("refit",), ridges=TINY).model
    x = torch.cat(data[:-1])
    with torch.no_grad():
        before, after = model.stem(x), found.stem(x)
        whole = F.relu(model.branch(1, before) + before)
        cut = F.relu(found.branch(1, after) + after)
        wanted = model.branch(2, whole) + model.norm(model.short(whole))
        if late:  # the shortcut comes last, so it makes up; its norm is known
            site, norm, given, other = found.short, found.norm, cut, found.branch(2, cut)
        else:
            site, norm, other = found.b2, found.m2, found.norm(found.short(cut))
            given = F.relu(found.n2(found.a2(cut)))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        old = small.norm if late else small.m2
        shift = norm.bias - old.running_mean * scale
        target = (wanted - other - shift[:, None, None]) / scale[:, None, None]
        probe = nn.Conv2d(site.in_channels, 8, site.kernel_size, padding=site.padding).double()
        weight, bias = brute_force(
            probe,
            given,
            target,
            weights_of("short" if late else "b2", model, small, plan, data)[:-1].flatten(0, 1),
        )
    torch.testing.assert_close(site.weight, weight, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(norm.running_mean, old.running_mean - bias, rtol=1e-7, atol=1e-7)


def test_recovery_gains_and_says_so() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 8, 8), 8)
    plan = surgeon.inspect(model, data[0]).plan(0.4, round_to=1)  # the stream as well
    small = plan.apply(model)
    found = recover(small, plan, model, data)
    fresh = batches((3, 8, 8), 1, 200, seed=9)[0]
    with torch.no_grad():
        far, near = ((m(fresh) - model(fresh)).norm() / model(fresh).norm() for m in (small, found.model))
    assert near < 0.6 * far and found.after < 0.6 * found.before
    assert abs(found.after - float(near)) < 0.2 * float(near), "what is reported is what new samples show"
    text = str(found)
    assert "refit" in text and f"{found.after:.2%}" in text
    assert recover(small, plan, model, data).after == found.after, "the same again"


def test_the_plan_may_come_from_a_file(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 4)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    plan.save(tmp_path / "plan.json")
    again = surgeon.Plan.load(tmp_path / "plan.json")
    small = again.apply(model)
    ours, theirs = recover(small, plan, model, data), recover(small, again, model, data)
    assert ours.after == theirs.after < ours.before


def test_nothing_that_hurts_is_taken() -> None:
    """Learned from one kind of input, judged by another: whatever fits the first is worse on the second."""
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 4)
    odd = [torch.zeros_like(batch) + 0.01 * batch[:1] for batch in data[:-1]]
    plan = surgeon.inspect(model, data[0]).plan(0.25, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, [*odd, data[-1]], steps=("batch_norm",))
    step = found.steps[0]
    assert step.after > step.before and not step.taken and found.after == found.before
    for name, tensor in small.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    assert "not taken" in str(found)


def test_batch_norms_are_reestimated_in_order() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 4)
    found = surgeon.inspect(model, data[0]).plan(0.5, round_to=1).apply(model)
    reestimate(
        Recording(model, found, [((x,), {}) for x in data], [False, False, False, True]),
        lambda items, what: items,
    )
    x = torch.cat(data[:-1])
    with torch.no_grad():
        given = found.a1(found.stem(x))
        torch.testing.assert_close(found.n1.running_mean, given.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.n1.running_var, given.var((0, 2, 3)), rtol=1e-10, atol=1e-10)
        given = found.b1(F.relu(found.n1(given)))  # with the norm before it already set
        torch.testing.assert_close(found.m1.running_mean, given.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)


def test_means_of_the_original() -> None:
    torch.manual_seed(0)
    first, between, consumer, shape = LAYERS["3x3"]
    model = Chain(first(), between(), consumer()).double().eval()
    data = batches(shape)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data, steps=("means",))
    assert found.steps[0].taken
    x = torch.cat(data[:-1])
    with torch.no_grad():
        torch.testing.assert_close(
            found.model(x).mean((0, 2, 3)), model(x).mean((0, 2, 3)), rtol=1e-9, atol=1e-9
        )
    assert torch.equal(found.model.consumer.weight, small.consumer.weight)


def test_variance_of_the_original() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 300, 4, dtype=torch.float64), 3 * torch.randn(2, 300, 5, dtype=torch.float64) + 1
    w, b = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    sums = Normal(2, 4, 5, x.device)
    for part in range(0, 300, 100):
        sums.add(x[:, part : part + 100], y[:, part : part + 100], torch.ones(100))
    new_w, new_b = sums.scaled(w, b)
    given = x @ new_w + new_b[:, None]
    torch.testing.assert_close(given.mean(1), y.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(given.var(1), y.var(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(new_w / w, (new_w / w)[:, :1].expand(w.shape), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        sums.error(w, b), (x @ w + b[:, None] - y).square().mean(1), rtol=1e-10, atol=1e-10
    )


def test_weighted_rows_are_repeated_rows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1, 30, 4, dtype=torch.float64), torch.randn(1, 30, 5, dtype=torch.float64)
    w, b = torch.randn(1, 4, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    times = torch.arange(30) % 3
    weighted, repeated = Normal(1, 4, 5, x.device), Normal(1, 4, 5, x.device)
    weighted.add(x, y, times.float())
    repeated.add(*(v.repeat_interleave(times, 1) for v in (x, y)), torch.ones(int(times.sum())))
    for name in ("gram", "cross", "square", "count"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))
    torch.testing.assert_close(weighted.error(w, b), repeated.error(w, b))
    torch.testing.assert_close(weighted.solve(w, b, 1e-2, True), repeated.solve(w, b, 1e-2, True))


class Gained(nn.Module):
    """Every position's result counts as often as its gain says; not at all behind a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.consumer = nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("gain", torch.tensor([0.0, 1.0, 1.0, 4.0])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return (self.consumer(torch.tanh(self.first(x))) * self.gain).sum(1)


def test_rows_weigh_as_the_outputs_feel_them() -> None:
    """Positions of other kinds: what is masked must not bend the fit, what counts four times weighs four
    times as much.
    """
    torch.manual_seed(0)
    model = Gained().double().eval()
    data = [x * torch.tensor([5.0, 1.0, 0.5, 2.0])[:, None] for x in batches((4, 6))]
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data, steps=("refit",), ridges=TINY)
    gain = model.gain / model.gain.mean()
    x = torch.cat(data[:-1])
    with torch.no_grad():
        given, wanted = torch.tanh(small.first(x)), model.consumer(torch.tanh(model.first(x)))
        weight, bias = brute_force(small.consumer, given, wanted, gain + 0.05)
        alike, _ = brute_force(small.consumer, given, wanted)
    torch.testing.assert_close(found.model.consumer.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.model.consumer.bias, bias, rtol=1e-8, atol=1e-8)
    assert (alike - weight).abs().max() > 0.05, "the weights must matter here"
    assert not found.remarks


def test_without_gradients_all_rows_have_the_same_weight() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.consumer = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.consumer(torch.tanh(self.first(x)))
            return y + (y - y).abs().sqrt()  # of 0: infinite times 0

    torch.manual_seed(0)
    model = Root().double().eval()
    data = batches((6,))
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    with torch.inference_mode():  # whatever the caller is in
        found = recover(small, plan, model, data, steps=("refit",), ridges=TINY)
    assert found.remarks == (
        "all rows of a layer have the same weight, as no gradient can be computed: one is NaN or infinite",
    )
    x = torch.cat(data[:-1])
    with torch.no_grad():
        weight, _ = brute_force(
            small.consumer, torch.tanh(small.first(x)), model.consumer(torch.tanh(model.first(x)))
        )
    torch.testing.assert_close(found.model.consumer.weight, weight, rtol=1e-8, atol=1e-8)


class Words(nn.Module):
    """Few texts of many words, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(400, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.down(F.relu(self.up(y)))).mean(1)


def test_one_ridge_for_all_where_the_outputs_gain() -> None:
    torch.manual_seed(1)
    model = Words().eval()
    data, fresh = list(torch.randint(0, 400, (6, 4, 12))), torch.randint(0, 400, (500, 12))
    plan = surgeon.inspect(model, data[0]).plan({"*": 0.0, "up": 0.3}, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data, steps=("refit",))
    ridge = found.steps[0].ridge
    assert ridge in STRONGER and f"all with ridge {ridge:g}" in str(found)
    each = recover(small, plan, model, data, steps=("refit",), ridges=RIDGES)
    alone = recover(small, plan, model, data, steps=("refit",), ridges=(ridge,))
    assert each.steps[0].ridge is None
    assert found.after == alone.after < each.after < found.before
    for (name, a), b in zip(found.model.state_dict().items(), alone.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        off = [float((m(fresh) - model(fresh)).norm()) for m in (found.model, each.model)]
    assert off[0] < off[1], "on texts that were not seen, too"


class Attention(nn.Module):
    """A transformer block, as many are: norm, attention, scaled branch, feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out, self.heads = nn.Linear(16, 48), nn.Linear(16, 16), 4
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.out(y)
        x = x + self.down(F.gelu(self.up(self.last(x))))
        return self.head(x)


def test_a_transformer() -> None:
    torch.manual_seed(0)
    model = Attention().double().eval()
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(20, (16, 9), generator=generator) for _ in range(10)]
    plan = surgeon.inspect(model, data[0]).plan({"*": 0.0, "qkv": 0.5, "up": 0.5}, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data)
    fits = {fit.name: fit for fit in found.steps[0].fits}
    assert fits["out"].taken and fits["down"].taken
    assert found.after < 0.7 * found.before
    fresh = torch.randint(20, (64, 9), generator=generator)
    with torch.no_grad():
        far, near = ((m(fresh) - model(fresh)).norm() for m in (small, found.model))
    assert near < 0.7 * far


class Smoothed(nn.Module):
    """Heads along a dim of their own, each with a convolution along the tokens that is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(12, 32), nn.Linear(32, 5)
        self.conv = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x).unflatten(-1, (4, -1)).transpose(1, 2)
        return self.out((v.sigmoid() + self.conv(v)).transpose(1, 2).flatten(2))


def test_whole_heads_with_dims_of_their_own() -> None:
    torch.manual_seed(0)
    model = Smoothed().double().eval()
    with torch.no_grad():  # the last head says what the first one says, so that it can be done without
        model.v.weight[24:], model.v.bias[24:] = model.v.weight[:8], model.v.bias[:8]
        model.conv.weight[3] = model.conv.weight[0]
    data = batches((9, 12), 6, 20)
    surgery = surgeon.inspect(model, data[0])
    plan = surgery.plan(
        0.25, round_to=1, heads="whole", criterion=lambda group, tensors: torch.arange(group.steps, 0, -1)
    )
    assert list(plan.kept["v.weight"][0]) == list(range(24)), "the last head leaves"
    small = plan.apply(model)
    found = recover(small, plan, model, data)
    fits = {fit.name: fit for fit in found.steps[0].fits}
    assert {"conv", "out"} <= fits.keys()
    assert all(not fit.skipped for fit in fits.values())
    assert found.before > 0.02
    assert found.after < 1e-5, "exact, but for the ridge"


class Logits(nn.Module):
    """Attention whose keys lie in half of the dims of each head, so that half of them can say the same."""

    def __init__(self, fused: bool, by_hand: bool) -> None:
        super().__init__()
        self.fused, self.by_hand, self.heads = fused, by_hand, 2
        if fused:
            self.qk, self.v = nn.Linear(12, 32), nn.Linear(12, 12)
        else:
            self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            q, k = self.qk(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.by_hand:
            return ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, scale=0.25)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_queries_aim_at_the_logits(fused: bool, by_hand: bool) -> None:
    torch.manual_seed(0)
    model = Logits(fused, by_hand).double().eval()
    with torch.no_grad():
        weight, bias = (model.qk.weight[16:], model.qk.bias[16:]) if fused else (model.k.weight, model.k.bias)
        for head in (slice(0, 8), slice(8, 16)):
            low = torch.randn(8, 4, dtype=torch.float64)
            weight[head] = low @ torch.randn(4, 12, dtype=torch.float64)
            bias[head] = low @ torch.randn(4, dtype=torch.float64)
    data = batches((7, 12), 6, 20)
    plan = surgeon.inspect(model, data[0]).plan(
        {"*": 0.0, ("qk" if fused else "q"): 0.5}, round_to=1, heads="dims"
    )
    small = plan.apply(model)
    found = recover(small, plan, model, data)
    assert found.before > 0.02
    assert found.after < 1e-5, "exact, but for the ridge"


@pytest.mark.parametrize("kind", ["conv", "norm", "linear", "transposed"])
def test_folding_without_data(kind: str) -> None:
    """Channels that are multiples of others, through norm and relu, are folded without loss."""
    torch.manual_seed(0)
    norm: nn.Module = nn.BatchNorm2d(8) if kind in ("norm", "conv") else nn.Identity()
    if kind == "linear":
        model, x = (
            nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 5)),
            torch.randn(4, 6).double(),
        )
    else:
        last = nn.ConvTranspose2d(8, 5, 3) if kind == "transposed" else nn.Conv2d(8, 5, 3, padding=1)
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), last), torch.randn(2, 3, 7, 7).double()
    trained_like(model)
    first: Any = model[0]
    scale = torch.tensor([0.5, 2.0, 0.25, 3.0], dtype=torch.float64)
    with torch.no_grad():
        first.weight[4:] = first.weight[:4]
        first.bias[4:] = first.bias[:4]
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.running_var):
                tensor[4:] = tensor[:4]
            norm.weight[4:], norm.bias[4:] = norm.weight[:4] * scale, norm.bias[:4] * scale
        else:
            first.weight[4:] *= scale.reshape(-1, *[1] * (first.weight.dim() - 1))
            first.bias[4:] *= scale
    plan = surgeon.inspect(model, x).plan({"*": 0.0, "0": 0.5}, round_to=1, criterion="first")
    small = plan.apply(model)
    found = recover(small, plan, model, example_inputs=x)
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() > 0.01
        torch.testing.assert_close(found.model(x), model(x), rtol=1e-10, atol=1e-10)
    assert "nothing judged it" in str(found)


def test_float32_and_batches_of_several_shapes() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks()).float()
    data = [batch.float() for batch in batches((3, 6, 6), 4)] + [
        torch.randn(8, 3, 10, 10),
        torch.randn(3, 3, 6, 6),
    ]
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    found = recover(plan.apply(model), plan, model, data)
    assert found.after < found.before and found.model.stem.weight.dtype is torch.float32


class Chosen(nn.Module):
    """Only the rows with the largest scores go on: which those are is a decision that hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.b, self.head = (
            nn.Linear(6, 16),
            nn.Linear(16, 1),
            nn.Linear(16, 16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        rows = self.score(y)[..., 0].topk(3, dim=1).indices
        y = y.gather(1, rows[..., None].expand(-1, -1, y.shape[-1]))
        return self.head(self.b(y).tanh())


def test_decisions_are_the_originals() -> None:
    """The small model would choose other rows; it is compared, and refitted, on those that the original
    chose.
    """
    torch.manual_seed(0)
    model = Chosen().double().eval()
    data = batches((8, 6), 6, 30)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, data)
    fit = next(fit for fit in found.steps[0].fits if fit.name == "head")
    assert fit.rows == 150 * 3 and fit.after < 0.9 * fit.before
    assert found.after < 0.7 * found.before


def test_shrink_with_calibration() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 6)
    plain = surgeon.shrink(model, 0.5, example_inputs=data[0], round_to=1)
    found = surgeon.shrink(model, 0.5, example_inputs=data[0], round_to=1, calibration=iter(data))
    by_hand = surgeon.shrink(
        model, 0.5, example_inputs=data[0], round_to=1, criterion="kfac", calibration=iter(data)
    )
    fresh = batches((3, 6, 6), 1, 100, seed=5)[0]
    with torch.no_grad():
        far, near, nearer = (float((m(fresh) - model(fresh)).norm()) for m in (plain, found, by_hand))
    assert near < 0.7 * far and nearer < 0.7 * far


def tiny() -> tuple[nn.Module, Any, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    data = batches((6,), 3)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    return model, plan, plan.apply(model), data


def test_bad_input() -> None:
    model, plan, small, data = tiny()
    for bad, message in (
        ([], "batches holds no batch"),
        (iter(()), "batches holds no batch"),
        (itertools.repeat(data[0]), "more than 50000 samples"),
        (data[0], "must be an iterable of batches"),
        ([data[0], "no tensor"], "batch 2 cannot be used"),
        ([data[0], torch.randn(4, 7, dtype=torch.float64)], "does not run on batch 2"),
        ([torch.randn(1, 6, dtype=torch.float64)], "one sample is too little"),
        ([data[0], torch.full((4, 6), torch.nan)], "batch 2 cannot be used: it holds NaN"),
    ):
        with pytest.raises(InputError, match=message):
            recover(small, plan, model, bad)
    for options, message in (
        (
            {"steps": ("refit", "magic")},
            "unknown step 'magic'[\\s\\S]*refit, means, variance, batch_norm, distill",
        ),
        ({"steps": "distill"}, "steps must be a list of names, got 'distill'"),
        ({"held_out": 0.0}, "held_out"),
        ({"ridges": ()}, "ridges"),
        ({"ridges": (0.0,)}, "ridges"),
    ):
        with pytest.raises(InputError, match=message):
            recover(small, plan, model, data, **options)


def test_batches_and_example_inputs_contradict() -> None:
    model, plan, small, data = tiny()
    with pytest.raises(InputError, match="got batches and example_inputs"):
        recover(small, plan, model, data, example_inputs=data[0])


def test_what_is_not_taken_leaves_unstored_statistics_too() -> None:
    """A batch norm's variance that no state dict stores is put back like any other tensor."""
    torch.manual_seed(0)
    model = trained_like(Blocks())
    for module in model.modules():
        module._non_persistent_buffers_set |= {"running_mean", "running_var"} & set(module._buffers)
    data = batches((3, 6, 6), 4)
    odd = [torch.zeros_like(batch) + 0.01 * batch[:1] for batch in data[:-1]]
    plan = surgeon.inspect(model, data[0]).plan(0.25, round_to=1)
    small = plan.apply(model)
    found = recover(small, plan, model, [*odd, data[-1]], steps=("batch_norm",))
    assert not found.steps[0].taken
    assert torch.equal(found.model.n1.running_var, small.n1.running_var)


def test_models_that_do_not_belong_together() -> None:
    model, plan, small, data = tiny()
    with pytest.raises(InputError, match=r"not what the plan makes[\s\S]*first.weight"):
        recover(model, plan, model, data)
    with pytest.raises(PlanError, match="another architecture"):
        recover(small, plan, nn.Linear(6, 5).double(), data)


def test_nan_names_the_first_layer() -> None:
    model, plan, _, data = tiny()
    data[1] = data[1] * 1e300
    model.first.weight.data *= 1e10
    with pytest.raises(InputError, match=r"batch 2 gives activations that are NaN or infinite[\s\S]*'first'"):
        recover(plan.apply(model), plan, model, data)


class Masked(nn.Module):
    """Attention that adds a mask of -inf to its logits in one op."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        found, _ = self.attention(x, x, x, attn_mask=later)
        return self.out(x + found)


def test_masked_logits_are_no_overflow() -> None:
    torch.manual_seed(0)
    model = Masked().double().eval()
    data = batches((5, 6), 6, 12)
    surgery = surgeon.inspect(model, data[0])
    assert any(op_name(node) == "baddbmm" for node in surgery.graph.fx.nodes)
    plan = surgery.plan(0.25, round_to=1)
    found = recover(plan.apply(model), plan, model, data, steps=("refit", "batch_norm", "distill"), epochs=2)
    assert found.after < 0.7 * found.before
    model.attention.in_proj_weight.data *= 1e200
    with pytest.raises(
        InputError, match=r"batch \d gives activations that are NaN or infinite[\s\S]*baddbmm"
    ):
        recover(plan.apply(model), plan, model, data)


def test_options_that_nothing_reads_are_refused() -> None:
    model, plan, small, data = tiny()
    for options, message in (
        ({"epochs": 3}, r"epochs is an option of the step 'distill'[\s\S]*'refit', 'batch_norm', 'distill'"),
        ({"rate": 0.1, "steps": ("means",)}, "rate is an option of the step 'distill'"),
    ):
        with pytest.raises(InputError, match=message):
            recover(small, plan, model, data, **options)
    for options in ({"steps": ("refit",)}, {"ridges": (1e-3,)}, {"epochs": 3}, {"rate": 0.1}):
        with pytest.raises(InputError, match=f"{next(iter(options))} needs samples"):
            recover(small, plan, model, example_inputs=data[0], **options)


class Classes(nn.Module):
    """Gives class numbers, and logits of which some are hidden."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first, self.second, self.hidden = nn.Linear(6, 8), nn.Linear(8, 5), hidden

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.second(torch.tanh(self.first(x)))
        return y.argmax(1), y.masked_fill(x[:, :1] > 0, -torch.inf) if self.hidden else y.argmin(1)


@pytest.mark.parametrize("steps", [("batch_norm",), ("refit",), ("distill",)])
@pytest.mark.parametrize("hidden", [False, True])
def test_outputs_that_cannot_be_compared_are_refused(hidden: bool, steps: tuple[str, ...]) -> None:
    """Before a step is judged by a distance of nothing to nothing, which no step can lower."""
    torch.manual_seed(0)
    model = Classes(hidden).double().eval()
    data = [-x.abs() for x in batches((6,), 3)]
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    data[-1] = data[-1].abs()  # judges
    with pytest.raises(InputError, match=r"no output can be compared[\s\S]*held out[\s\S]*logits"):
        recover(plan.apply(model), plan, model, data, steps=steps)


@pytest.mark.parametrize("steps", [("refit",), ("distill",)])
def test_a_batch_of_which_no_output_can_be_compared_is_learned_from(steps: tuple[str, ...]) -> None:
    """By its layers' values."""
    torch.manual_seed(0)
    model = Classes(True).double().eval()
    data = [-x.abs() for x in batches((6,), 3)]
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    data[0] = data[0].abs()
    assert recover(plan.apply(model), plan, model, data, steps=steps).steps[0].taken


class Spectrum(nn.Module):
    """Gives complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.second(torch.tanh(self.first(x)))).conj()


@pytest.mark.parametrize("steps", [("refit",), ("distill",)])
def test_complex_outputs_are_compared(steps: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Spectrum().double().eval()
    data = batches((6,), 3)
    plan = surgeon.inspect(model, data[0]).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, data[0]).error < 1e-12
    found = recover(small, plan, model, data, steps=steps)
    with torch.no_grad():
        off = [
            float((m(data[2]) - model(data[2])).norm() / model(data[2]).norm()) for m in (small, found.model)
        ]
    assert found.before == pytest.approx(off[0], rel=1e-9) and found.after == pytest.approx(off[1], rel=1e-9)
    assert off[1] < 0.9 * off[0]


def test_a_single_batch_says_what_it_lacks() -> None:
    model, plan, small, data = tiny()
    found = recover(small, plan, model, data[:1])
    assert (found.learned, found.held) == (34, 6)
    assert any("a single batch" in remark for remark in found.remarks)
    found = recover(small, plan, model, [data[0][:4]], ridges=(1e-3,))
    assert any("rank-deficient" in remark for remark in found.remarks)
    assert found.after <= found.before
    assert np.isfinite(found.after)
