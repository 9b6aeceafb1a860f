"""The step "distill" of recovery: its loss against a direct computation, the size of its steps, what it
gains, what it leaves.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_recover import Attention, Blocks, batches, tiny, trained_like
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError
from surgeon.recovery.distill import Distilling
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.recover import recover
from surgeon.recovery.runs.recording import Recording

ONLY = ("distill",)


def cut(model: nn.Module, data: list[Tensor], ratio: Any = 0.4) -> tuple[surgeon.Plan, nn.Module]:
    plan = surgeon.inspect(model, data[0]).plan(ratio, round_to=1)
    return plan, plan.apply(model)


def distilling(
    model: nn.Module, small: nn.Module, plan: surgeon.Plan, data: list[Tensor], **options: Any
) -> Distilling:
    held = [False] * (len(data) - 1) + [True]
    recording = Recording(model, small, [((x,), {}) for x in data], held)
    return Distilling(
        recording, KeptEntries(recording.big, plan), **{"epochs": 1, "rate": 0.01, "seed": 0, **options}
    )


def far(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


def sums(model: Blocks, x: Tensor) -> list[Tensor]:
    """The residual stream after each block, and the outputs."""
    x = model.stem(x)
    first = model.branch(1, x) + x
    x = F.relu(first)
    second = model.branch(2, x) + model.norm(model.short(x))
    return [first, second, model.head(F.relu(second).mean((2, 3)))]


def test_the_loss_is_that_of_a_direct_computation() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 3)
    plan, small = cut(model, data)
    found = distilling(model, small, plan, data)
    loss = found.loss(found.recording.pair(0))
    kept = [plan.kept.get(name, {}).get(0, range(8)) for name in ("stem.weight", "short.weight")]
    assert all(len(some) < 8 for some in kept), "the stream is cut, too"
    with torch.no_grad():
        wanted = sums(model, data[0])
    wanted[:2] = [value[:, list(some)] for value, some in zip(wanted, kept, strict=False)]
    parts = [
        (b - a).square().sum() / a.square().sum() for a, b in zip(wanted, sums(small, data[0]), strict=True)
    ]
    direct = parts[2] + 90 * (parts[0] + parts[1]) / 2
    torch.testing.assert_close(loss, direct, rtol=1e-10, atol=0)
    names = sorted(name for name, _ in small.named_parameters())
    ours = torch.autograd.grad(loss, [found.leaves[name] for name in names])
    theirs = torch.autograd.grad(direct, [small.get_parameter(name) for name in names])
    assert len(names) == len(found.leaves)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-8, atol=1e-10, msg=name)


def test_without_a_stream_every_layer_is_imitated() -> None:
    model, plan, small, data = tiny()
    found = distilling(model, small, plan, data)
    kept = list(plan.kept["first.weight"][0])
    with torch.no_grad():
        inner, wanted = model.first(data[0])[:, kept], model(data[0])
    pairs = [(inner, small.first(data[0])), (wanted, small(data[0])), (wanted, small(data[0]))]
    parts = [(b - a).square().sum() / a.square().sum() for a, b in pairs]
    torch.testing.assert_close(
        found.loss(found.recording.pair(0)), parts[2] + 90 * (parts[0] + parts[1]) / 2, rtol=1e-10, atol=0
    )


def test_steps_are_relative_to_the_size_of_a_tensor() -> None:
    """The first step changes what Adam trains by rate x its root mean square, each entry; matrices by about
    that in the mean.
    """
    torch.manual_seed(0)
    model = trained_like(Blocks())
    with torch.no_grad():
        model.head.weight.mul_(100)
    data = batches((3, 6, 6), 2)
    plan, small = cut(model, data)
    found = distilling(model, small, plan, data, rate=1e-4)
    found.run(lambda items, _: items)
    for name, before in small.state_dict().items():
        if name not in found.leaves:
            continue
        step, size = (
            found.leaves[name].detach().reshape(before.shape) - before,
            float(before.square().mean().sqrt()),
        )
        if before.dim() == 1:
            torch.testing.assert_close(
                step.abs(), torch.full_like(step, 1e-4 * size), rtol=1e-3, atol=0, msg=name
            )
        else:
            assert 0.4 < float(step.square().mean().sqrt()) / (1e-4 * size) < 1.3, name


def test_it_gains_on_samples_that_were_not_seen() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 16, 20)
    plan, small = cut(model, data)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    plain = recover(small, plan, model, data)
    found = recover(small, plan, model, data, steps=("refit", "batch_norm", "distill"), epochs=12)
    assert [step.name for step in found.steps] == ["refit", "batch_norm", "distill"]
    assert found.steps[2].before == plain.after and found.steps[2].peak > 0 and "distill: " in str(found)
    fresh = batches((3, 6, 6), 1, 200, seed=9)[0]
    assert found.after < 0.9 * plain.after
    assert far(model, found.model, fresh) < 0.9 * far(model, plain.model, fresh)
    assert abs(found.after - far(model, found.model, fresh)) < 0.2 * found.after, (
        "what is reported is what new samples show"
    )
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[name]), f"the small model is not touched: {name}"
    for name, tensor in found.model.named_buffers():
        assert torch.equal(tensor, plain.model.get_buffer(name)), f"norms keep their statistics: {name}"
    assert all(parameter.grad is None for m in (model, small, found.model) for parameter in m.parameters())


def test_seeds() -> None:
    model, plan, small, data = tiny()
    found = [
        recover(small, plan, model, data, steps=ONLY, epochs=3, seed=seed).model.consumer.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("options", [{"rate": 0.99}, {"epochs": 5}])
def test_nothing_that_hurts_is_taken(options: dict[str, Any]) -> None:
    """Too high a rate; or learned from one kind of input and judged by another."""
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 4)
    if "epochs" in options:
        data = [*(torch.zeros_like(batch) + 100 * batch[:1] for batch in data[:-1]), data[-1]]
    plan, small = cut(model, data, 0.25)
    found = recover(small, plan, model, data, steps=ONLY, **{"epochs": 1, **options})
    assert not found.steps[0].taken and found.after == found.before and "not taken" in str(found)
    for (name, a), b in zip(found.model.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_best_epoch_counts() -> None:
    """The model gets the weights after the epoch whose held-out distance was least, not the last ones."""
    torch.manual_seed(0)
    model = trained_like(Blocks())
    data = batches((3, 6, 6), 6)
    plan, small = cut(model, data)
    found = distilling(model, small, plan, data, epochs=4, rate=0.2)
    seen = []
    measure = found._distance
    found._distance = lambda: seen.append(measure()) or seen[-1]  # type: ignore[method-assign]
    result = found.run(lambda items, _: items)
    assert len(seen) == 5 and result.distance == min(seen) and min(seen) != seen[-1], (
        "a later epoch must be worse here"
    )
    assert found.recording.distance() == pytest.approx(min(seen), rel=1e-12)


def test_a_transformer_in_inference_mode() -> None:
    torch.manual_seed(0)
    model = Attention().double().eval()
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(20, (16, 9), generator=generator) for _ in range(10)]
    plan, small = cut(model, data, {"*": 0.0, "qkv": 0.5, "up": 0.5})
    with torch.inference_mode():  # whatever the caller is in
        found = recover(small, plan, model, data, steps=ONLY, epochs=15)
    fresh = torch.randint(20, (64, 9), generator=generator)
    assert far(model, found.model, fresh) < 0.7 * far(model, small, fresh)


class Learned(nn.Module):
    """Fused attention with a learned mask, of grouped heads, or with a scale; recorded without gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.heads = kind, 2 if kind == "grouped" else 4
        self.embed, self.query = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.key, self.value, self.out = (
            nn.Linear(16, 4 * self.heads),
            nn.Linear(16, 4 * self.heads),
            nn.Linear(16, 16),
        )
        self.places = nn.Parameter(torch.randn(1, 4, 9, 9))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        query, key, value = (
            f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mask = (
            2 * self.places if self.kind == "mask" else None
        )  # computed: what is recorded without gradients has none
        options = (
            {"scale": 0.7, "is_causal": True}
            if self.kind == "scale"
            else {"enable_gqa": self.kind == "grouped"}
        )
        attended = F.scaled_dot_product_attention(query, key, value, mask, **options)
        return x + self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["mask", "grouped", "scale"])
def test_fused_attention_has_all_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model = Learned(kind).double().eval()
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(20, (16, 9), generator=generator) for _ in range(4)]
    small = copy.deepcopy(model)
    plan = surgeon.inspect(model, data[0]).plan(0.0)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = distilling(model, small, plan, data)
    ops = [str(node.target) for node in found.recording.small.fx.nodes]
    assert sum("_scaled_dot_product" in op for op in ops) == 1, "recorded as one op"
    loss = found.loss(found.recording.pair(0))
    with torch.no_grad():
        wanted = model(data[0])
    got = small(data[0])
    direct = (1 + 90) * (got - wanted).square().sum() / wanted.square().sum()
    torch.testing.assert_close(loss, direct, rtol=1e-10, atol=0)
    names = sorted(found.leaves)
    assert ("places" in names) == (kind == "mask")
    ours = torch.autograd.grad(loss, [found.leaves[name] for name in names])
    theirs = torch.autograd.grad(direct, [small.get_parameter(name) for name in names])
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-8, atol=1e-10, msg=name)


class Shared(nn.Module):
    """A weight that is read twice, one that is computed, and one of a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.mix = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 1))
        self.deep, self.back = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = x + self.back(F.gelu(self.deep(self.mix(x))))
        return x.transpose(1, 2) @ self.embed.weight.t()


class Filled(nn.Module):
    """Writes what two layers give into one tensor (as DeepSeek's attention makes its keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = x.new_empty(*x.shape[:-1], 12)
        both[..., :8].copy_(self.a(x))
        both[..., 8:].copy_(self.b(x))
        return self.c(both.sin())


def test_what_is_written_into_a_tensor_has_gradients() -> None:
    torch.manual_seed(0)
    model, data = Filled().double().eval(), [torch.randn(16, 6, dtype=torch.float64) for _ in range(4)]
    small, plan = copy.deepcopy(model), surgeon.inspect(model, data[0]).plan(0.0)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = distilling(model, small, plan, data)
    assert any("aten.copy." in str(node.target) for node in found.recording.small.fx.nodes)
    leaves = [found.leaves[name] for name in sorted(found.leaves)]
    gradients = torch.autograd.grad(found.loss(found.recording.pair(0)), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        way, sides = torch.randn_like(leaf), []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                leaf += step * way
            sides.append(float(found.loss(found.recording.pair(0)).detach()))
        with torch.no_grad():
            leaf += 1e-5 * way
        assert float((gradient * way).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


def test_all_weights_take_part() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    data = list(torch.randint(12, (8, 16, 7)))
    plan, small = cut(model, data, 0.25)
    found = recover(small, plan, model, data, steps=ONLY, epochs=10)
    assert found.steps[0].taken
    for (name, a), b in zip(found.model.named_parameters(), small.parameters(), strict=True):
        assert not torch.equal(a, b), name


def test_shrink_takes_the_steps() -> None:
    model, plan, small, data = tiny()
    found = surgeon.shrink(model, 0.5, example_inputs=data[0], round_to=1, calibration=data, recovery=ONLY)
    by_hand = recover(small, plan, model, data, steps=ONLY).model
    for (name, a), b in zip(found.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match=r"recovery needs samples[\s\S]*calibration"):
        surgeon.shrink(model, 0.5, example_inputs=data[0], recovery=ONLY)
    with pytest.raises(InputError, match="unknown step 'magic'"):
        surgeon.shrink(model, 0.5, example_inputs=data[0], calibration=data, recovery=("magic",))


def test_bad_input() -> None:
    model, plan, small, data = tiny()
    for options, message in (
        ({"epochs": 0}, "epochs must be a positive whole number, got 0"),
        ({"epochs": True}, "epochs must be a positive whole number"),
        ({"rate": 0.0}, "rate must be a share"),
        ({"rate": float("nan")}, "rate must be a share"),
    ):
        with pytest.raises(InputError, match=message):
            recover(small, plan, model, data, steps=ONLY, **options)


def test_without_gradients_it_is_refused() -> None:
    class Next(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(torch.tanh(self.first(x)))
            return torch.special.gammainc(y.exp(), x[:, :1].exp())

    torch.manual_seed(0)
    model = Next().eval()
    data = [batch.float() for batch in batches((6,), 3)]
    plan, small = cut(model, data, 0.5)
    with pytest.raises(InputError, match=r"'distill' found no gradients: [\s\S]*leave 'distill' out"):
        recover(small, plan, model, data, steps=ONLY)


def test_nan_names_the_first_layer() -> None:
    model, plan, _, data = tiny()
    data[1] = data[1] * 1e300
    model.first.weight.data *= 1e10
    with pytest.raises(InputError, match=r"batch 2 gives activations that are NaN or infinite[\s\S]*'first'"):
        recover(plan.apply(model), plan, model, data, steps=ONLY)


def test_a_single_batch_and_several_shapes() -> None:
    torch.manual_seed(0)
    model = trained_like(Blocks()).float()
    data = [x.float() for x in batches((3, 6, 6), 3)]
    plan, small = cut(model, data)
    assert recover(small, plan, model, data[:1], steps=ONLY, epochs=3).steps[0].taken
    mixed = [torch.randn(8, 3, 10, 10), torch.randn(3, 3, 6, 6), *data]
    assert recover(small, plan, model, mixed, steps=ONLY, epochs=3).steps[0].taken


def test_half_precision() -> None:
    """Steps are taken in float32, in which small ones add up; the model keeps its type."""
    torch.manual_seed(0)
    model = trained_like(Blocks()).bfloat16()
    data = [x.bfloat16() for x in batches((3, 6, 6), 6)]
    plan, small = cut(model, data)
    assert {leaf.dtype for leaf in distilling(model, small, plan, data).leaves.values()} == {torch.float32}
    found = recover(small, plan, model, data, steps=ONLY, epochs=10, rate=5e-4)
    assert found.steps[0].taken and found.model.stem.weight.dtype is torch.bfloat16


def test_few_batches_are_read_more_often() -> None:
    model, plan, small, data = tiny()
    for given, epochs in ((data, 300), (batches((6,), 72, 2), 10)):
        assert distilling(model, small, plan, given, epochs=None).epochs == epochs
