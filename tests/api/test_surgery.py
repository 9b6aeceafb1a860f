"""Whole surgeries on awkward models: training-only branches, linked widths, literals that must pickle,
several inputs.
"""

from __future__ import annotations

import copy
import io
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from motifs import Flatten, FusedQKV
from torch import Tensor, nn
from wrong import wrong_cuts

import surgeon
from surgeon.cut.slice import shrink_module
from surgeon.errors import MendError, ProofError


class Auxiliary(nn.Module):
    """An auxiliary head that only training runs, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.aux, self.drop = nn.Conv2d(16, 4, 1), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return (self.b(x), self.drop(self.aux(x))) if self.training else self.b(x)


def test_branches_of_training_mode_are_cut_along() -> None:
    model = Auxiliary()
    small = surgeon.shrink(model, 0.5, example_inputs=torch.randn(1, 3, 6, 6))
    assert small.aux.weight.shape == (4, 8, 1, 1)
    main, aux = small.train()(torch.randn(2, 3, 6, 6))
    (main.sum() + aux.sum()).backward()


def test_branches_of_training_mode_are_proven() -> None:
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(1, 3, 6, 6)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    proof = surgeon.verify(model, plan.apply(model), plan, x)
    assert len(proof.errors) == 3 and proof.compared == 5 and proof.error < 1e-12 and not proof.unread
    tried = [
        next(iter(set(bad.kept) - {n for n in bad.kept if bad.kept[n] == plan.kept[n]}))
        for _, bad in wrong_cuts(model, plan)
    ]
    assert tried == ["a.weight", "a.bias", "b.weight", "aux.weight"]
    for wrong, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, x)


def test_a_part_that_is_compiled_is_cut() -> None:
    torch.manual_seed(0)
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()))
    model, x = nn.Sequential(part, nn.Conv2d(8, 3, 1)), torch.randn(2, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = surgeon.shrink(model, 0.5, example_inputs=x, round_to=1)
    assert [tuple(p.shape) for p in small.parameters()] == [
        (4, 3, 3, 3),
        (4,),
        (4,),
        (4,),
        (3, 4, 1, 1),
        (3,),
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


class Masking(nn.Module):
    """In training some samples are masked at random, by NumPy and Python (as SpecAugment does in speech
    models).
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.masked, self.b = nn.Linear(4, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            drawn = torch.from_numpy(
                np.random.rand(len(y)) + random.random()
            )  # as in the models that are meant
            y = torch.where((drawn > 1)[:, None], y, self.masked)
        return self.b(y)


def test_what_is_drawn_otherwise_is_the_same_while_a_cut_is_proved() -> None:
    torch.manual_seed(0)
    model, x = Masking(), torch.randn(8, 4)
    random.seed(5)
    np.random.seed(5)
    plan = surgeon.inspect(model, x).plan(0.5, round_to=1)
    proof = surgeon.verify(model, plan.apply(model), plan, x)
    assert len(proof.errors) == 2 and proof.error < 1e-12 and not proof.unread and "masked" in plan.kept
    drawn = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    assert drawn == (random.random(), np.random.rand()), "their states are put back"
    for wrong, bad in wrong_cuts(model, plan):
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, x)


def test_what_no_run_reads_is_said() -> None:
    class Deeper(nn.Module):
        """Another layer for larger batches."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.more, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x + self.more(x) if len(x) > 4 else x)

    model = Deeper()
    surgery = surgeon.inspect(model, torch.randn(5, 4))
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, torch.randn(5, 4)).unread == ()
    proof = surgeon.verify(model, small, plan, torch.randn(2, 4))
    assert proof.unread == ("more.bias", "more.weight") and "no run read: more.bias, more.weight" in str(
        proof
    )


def test_unused_parameters_are_said_and_kept() -> None:
    class Unused(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 8), nn.Linear(8, 2))
            self.spare = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    surgery = surgeon.inspect(Unused(), torch.randn(2, 4))
    assert any("spare" in remark for remark in surgery.remarks)
    assert surgery.plan(0.5).apply(surgery.model).spare.weight.shape == (8, 8)


class Columns(nn.Module):
    """A linear layer whose weight holds the outputs in dim 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class OneSize(nn.Module):
    """One number for the parts of two widths, of which one is the model's output and stays."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), kind(4, 8), nn.Linear(8, 6)
        self.d, self.size = nn.Linear(6, 3), 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.isnan().any():  # which no tracer follows
            raise ValueError
        a, b = (layer(x).view(-1, 2, self.size) for layer in (self.a, self.b))
        return a, self.d(self.c(b.tanh().flatten(1)).relu())


@pytest.mark.parametrize("kind", [nn.Linear, Columns])
def test_layers_that_are_to_stay_are_named(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = OneSize(kind), torch.randn(5, 4)
    with pytest.raises(MendError, match=re.escape("4 should be 2")) as caught:
        surgeon.shrink(model, 0.5, example_inputs=x)
    assert str(caught.value).endswith("keep the layers that give these channels, ignore=['b']")
    small = surgeon.shrink(model, 0.5, example_inputs=x, ignore=["b"])
    assert 8 in small.b.weight.shape
    assert small.c.out_features < 6


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.4, 0.6, 0.9])
def test_widths_that_the_code_computes_from_one_another_stay_linked(ratio: float) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    x = torch.randn(2, 5, 24)
    # the layer's output is the model's: it stays
    small = surgeon.shrink(layer, ratio, round_to=1, example_inputs=x, ignore=["norm2"])
    assert small.self_attn.embed_dim == 24
    stack = nn.Sequential(
        nn.Linear(6, 24), nn.TransformerEncoderLayer(24, 3, 40, batch_first=True), nn.Linear(24, 2)
    )
    small = surgeon.shrink(stack, ratio, round_to=1, example_inputs=torch.randn(2, 5, 6))
    attention = small[1].self_attn
    assert attention.in_proj_weight.shape[0] == 3 * attention.embed_dim
    assert attention.embed_dim == small[0].out_features < 24
    assert attention.embed_dim % attention.num_heads == 0


@pytest.mark.parametrize("fused", [False, True])
def test_swin_style_sizes_are_linked(fused: bool) -> None:
    class Window(nn.Module):
        """Head dims computed from the input's width, and the square root of a head dim that follows."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.proj, self.out = (
                nn.Linear(*s) for s in ((5, 24), (24, 72), (24, 24), (24, 3))
            )
            self.heads = 3

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            scale = (c // self.heads) ** -0.5
            if fused:
                y = F.scaled_dot_product_attention(q, k, v, scale=scale)
            else:
                y = (q * scale @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.out(x + self.proj(y.transpose(1, 2).reshape(b, n, c)))

    torch.manual_seed(0)
    model, x = Window(), torch.randn(2, 7, 5)
    surgery = surgeon.inspect(model, x)
    assert len(surgery.links) >= 1
    for ratio in (0.3, 0.5, 0.7):
        plan = surgery.plan(ratio)
        small = plan.apply(model)
        proof = surgeon.verify(model, small, plan, x)
        assert proof.error <= 1e-9
        head_dim = small.embed.out_features // small.heads
        assert small.qkv.out_features == 3 * small.embed.out_features
        if head_dim != 8:  # the scale 8**-0.5 became head_dim**-0.5, and the proof says so
            assert [(round(before**-2), round(after**-2)) for _, before, after in proof.rescaled] == [
                (8, head_dim)
            ]
        else:
            assert not proof.rescaled


def test_a_module_with_a_changed_literal_stays_the_users() -> None:
    torch.manual_seed(0)
    model, x = Flatten(), torch.randn(2, 3, 3, 3)
    small = surgeon.shrink(model, 0.5, example_inputs=x)
    assert isinstance(small, Flatten)
    assert type(small).__name__ == "Flatten"
    want = small(x)
    torch.testing.assert_close(copy.deepcopy(small)(x), want, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # our own file: what is tested is that it pickles
    torch.testing.assert_close(loaded(x), want, rtol=0, atol=0)
    smaller = surgeon.shrink(small, 0.5, example_inputs=x)  # and it can be cut again
    assert smaller.a.out_channels == 2
    assert model(x).shape == (2, 4)
    assert type(model) is Flatten


def test_a_plan_with_edits_replays_from_disk(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, x = FusedQKV("3hd"), torch.randn(2, 7, 5)
    plan = surgeon.inspect(model, x).plan(0.5)
    plan.save(f"{tmp_path}/plan.json")
    small = surgeon.Plan.load(f"{tmp_path}/plan.json").apply(model)
    torch.testing.assert_close(small(x), plan.apply(model)(x), rtol=0, atol=0)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(y))

    x, y = torch.randn(2, 4), torch.randn(2, 6)
    for inputs in ((x, y), {"x": x, "y": y}):
        small = surgeon.shrink(Two(), 0.5, example_inputs=inputs)
        assert small.a.out_features == small.b.out_features == 4


WIDTH = 8


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.relu() if y.shape[-1] == WIDTH else F.gelu(y)
        return self.b(y)


class DecidesHere(Decides):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.relu() if y.shape[-1] == 8 else F.gelu(y)
        return self.b(y)


def test_a_decision_on_a_width_is_refused() -> None:
    with pytest.raises(MendError, match="another path") as caught:
        surgeon.shrink(Decides(), 0.5, example_inputs=torch.randn(2, 4))
    assert "min_channels" not in str(caught.value)


def test_a_decision_on_a_width_is_mended_where_the_number_is_in_the_code() -> None:
    torch.manual_seed(0)
    model, x = DecidesHere(), torch.randn(2, 4)
    plan = surgeon.inspect(model, x).plan(0.5, round_to=1)
    small = plan.apply(model)
    assert [(edit.kind, edit.old, edit.new) for edit in plan.edits] == [("source", 8, 4)]
    torch.testing.assert_close(small(x), small.b(small.a(x).relu()))


def test_widths_of_one_that_code_treats_apart() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(4, 4), nn.Linear(4, 3), 4

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 1, self.width).squeeze())

    torch.manual_seed(0)
    model, x = Squeezes(), torch.randn(2, 4)
    with pytest.raises(MendError, match=r"keep two channels everywhere with min_channels=2"):
        surgeon.shrink(model, 0.75, example_inputs=x, round_to=1)
    assert surgeon.shrink(model, 0.75, example_inputs=x, round_to=1, min_channels=2).a.out_features == 2


def test_widths_of_one_that_torch_treats_apart() -> None:
    class Slots(nn.Module):
        """einsum sums over a dim of one entry in another way."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.slots, self.b = nn.Linear(4, 8), nn.Parameter(torch.randn(8, 3, 2)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            weights = torch.einsum("bmd,dnp->bmnp", x, self.slots)
            return self.b(
                torch.einsum("bnpd,bmnp->bmd", torch.einsum("bmd,bmnp->bnpd", x, weights), weights.softmax(1))
            )

    class Mixes(nn.Module):
        """A linear layer makes a view of what is one value wide, and copies what is wider."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.mix, self.b = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.mix(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    torch.manual_seed(0)
    for model, x in ((Slots(), torch.randn(2, 5, 4)), (Mixes(), torch.randn(2, 3, 5, 5))):
        surgery = surgeon.inspect(model, x)
        plan = surgery.plan(0.8, round_to=1)
        small = plan.apply(model)
        assert surgeon.verify(model, small, plan, x).error < 1e-12
        assert min(min(tensor.shape) for tensor in small.parameters()) == 1


class Einsum(nn.Module):
    """Attention whose heads torch's einsum multiplies one by one; a single head, or dim, is one of its dims
    of size 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dims = 2, 6
        self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, self.dims)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return self.out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("ratio", "heads", "left"), [(0.5, "whole", (1, 6)), (0.85, "dims", (2, 1))])
def test_a_single_head_is_left_to_einsum(ratio: float, heads: str, left: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = Einsum().eval(), torch.randn(3, 7, 5)
    plan = surgeon.inspect(model, x).plan(ratio, heads=heads, round_to=1)
    small = plan.apply(model)
    assert (small.heads, small.dims) == left
    assert surgeon.verify(model, small, plan, x).error < 1e-12
    assert small(torch.randn(2, 9, 5)).shape == (2, 9, 5)


class Divides(nn.Module):
    """Attention whose code computes each size from two numbers, in a model that holds many more of the
    same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(5, 112), Divided(112, 4), nn.Linear(112, 3)
        self.labels = {f"label {n}": 4 for n in range(100)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x))


class Divided(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        size = self.width // self.heads
        q, k, v = (
            layer(x).view(*x.shape[:2], self.heads, size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = (q @ k.mT).softmax(-1) @ v
        return y.transpose(1, 2).reshape(*x.shape[:2], self.heads * size)


class Sums(nn.Module):
    """A number on the very line, and a value that nobody uses, as long as there are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = Divided(16, 4), Summed()
        self.labels = {f"label {n}": 4 for n in range(100)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        y.mean(-1)[:, None].expand(-1, self.attention.heads, -1)
        return self.last(y)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(x.shape[:-1] + (2, 4)).sum(-1))


def test_numbers_on_the_line_come_before_those_of_the_model_and_unused_values_have_any_size() -> None:
    torch.manual_seed(0)
    model, x = Sums(), torch.randn(3, 7, 16)
    plan = surgeon.inspect(model, x).plan(0.5, heads="whole", round_to=1)
    small = plan.apply(model)
    assert (small.attention.heads, small.last.a.out_features, small.labels) == (2, 4, model.labels)
    assert surgeon.verify(model, small, plan, x).error < 1e-12


def test_numbers_of_the_module_itself_are_tried_together_before_those_of_the_model() -> None:
    torch.manual_seed(0)
    model, x = Divides(), torch.randn(3, 7, 5)
    plan = surgeon.inspect(model, x).plan(0.25, heads="whole", round_to=1)
    small = plan.apply(model)
    assert (small.attention.width, small.attention.heads, small.labels) == (84, 3, model.labels)
    assert surgeon.verify(model, small, plan, x).error < 1e-12


def test_print_out() -> None:
    text = str(surgeon.inspect(FusedQKV("3hd"), torch.randn(2, 7, 5)))
    assert "qkv.weight[0] rows: " in text
    assert "4 steps" in text
    assert "is the model's output 'output': out.weight[0]" in text
    assert "params" in text
    assert "MACs" in text


def test_small_modules_train_and_keep_state_dicts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    small = surgeon.shrink(model, 0.5, example_inputs=torch.randn(2, 4))
    assert list(small.state_dict()) == list(model.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    x, y = torch.randn(64, 4), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_results_that_are_not_finite_prove_nothing() -> None:
    class Overflows(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 0

    model, x = Overflows(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4)
    plan = surgeon.inspect(model, x).plan(0.5)
    with pytest.raises(ProofError, match="no finite number"):
        surgeon.verify(model, plan.apply(model), plan, x)


class Root(nn.Module):
    """As of a variance: a number where nothing is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).sqrt()


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.Threshold(0.1, 0.0), Root()],
)
def test_wrong_cuts_are_found_where_activations_are_zero(activation: nn.Module) -> None:
    """All channels are far below zero: only activations that leak show which of them the second layer
    reads.
    """
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3)), torch.randn(2, 4)
    with torch.no_grad():
        model[0].bias -= 20
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, x).hidden == 0
    tried = 0
    for wrong, bad in wrong_cuts(model, plan):
        assert torch.equal(wrong(x), small(x)), "a plain run shows nothing"
        with pytest.raises(ProofError, match="relative error"):
            surgeon.verify(model, wrong, bad, x)
        tried += 1
    assert tried == 3


def test_channels_of_which_nothing_is_shown_are_counted() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[:3] = 0
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(
        0.25, round_to=1, criterion=lambda group, tensors: [float(i > 3) for i in range(8)][::-1]
    )
    proof = surgeon.verify(model, plan.apply(model), plan, x)
    assert proof.hidden == len({0, 1, 2} & set(plan.kept["0.bias"][0])) > 0
    assert f"{proof.hidden} channels were zero throughout" in str(proof)


def test_activations_that_overflow_when_they_leak_leave_the_first_run() -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x) - 1000)
            return self.b(y) + torch.exp(y).sum(1, keepdim=True)

    torch.manual_seed(0)
    model, x = Steep(), torch.randn(2, 4)
    plan = surgeon.inspect(model, x).plan(0.5, round_to=1)
    proof = surgeon.verify(model, plan.apply(model), plan, x)
    assert proof.hidden == 4 and proof.error < 1e-12
    with torch.no_grad():
        model.a.bias += 1000
    assert surgeon.verify(model, plan.apply(model), plan, x).hidden == 0


def test_a_small_model_that_gives_nan_is_rejected() -> None:
    """NaN compares false with everything: it must not slip through a maximum."""

    class Sour(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            return self[1](x if x.shape[1] == 8 else x * float("nan"))

    model, x = Sour(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4)
    plan = surgeon.inspect(model, x).plan(0.5)
    small = shrink_module(model, plan.kept)
    with pytest.raises(ProofError, match="relative error inf"):
        surgeon.verify(model, small, plan, x)


def test_in_inference_mode_as_elsewhere() -> None:
    """Plan, cut and proof are the same, and the small model can be trained."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    outside = surgeon.shrink(model, 0.5, example_inputs=x)
    with torch.inference_mode():
        inside = surgeon.shrink(model, 0.5, example_inputs=x.clone())
    for (name, a), b in zip(inside.named_parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b) and not a.is_inference(), name
    inside(x).sum().backward()
