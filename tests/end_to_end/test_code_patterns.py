"""Idioms of well-known libraries in miniature: how their code writes sizes, checks them, and makes what it
adds.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import surgeon
from surgeon.errors import MendError, ProofError


def cut(model: nn.Module, x: Any, ratio: float = 0.5) -> nn.Module:
    """The small model: proven, copied and pickled as well."""
    torch.manual_seed(0)
    model.eval()
    small = surgeon.shrink(model, ratio, example_inputs=x, round_to=1)
    inputs = x if isinstance(x, tuple) else (x,)
    want = small(*copy.deepcopy(inputs))
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        torch.testing.assert_close(other(*copy.deepcopy(inputs)), want)
    return small


class Attention(nn.Module):
    """Self-attention; `split` says how einops is asked for the heads."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.how = nn.Linear(6, 72), nn.Linear(24, 6), 4, split
        self.layer = Rearrange("b n (k h d) -> k b h n d", k=3, h=4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "layer":
            q, k, v = self.layer(self.qkv(x)).unbind(0)
        elif self.how == "attribute":
            q, k, v = (
                rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in self.qkv(x).chunk(3, -1)
            )
        else:
            q, k, v = self.qkv(x).chunk(3, -1)
            q = rearrange(q, "b n (h d) -> b h n d", h=4)
            k = rearrange(k, "b n (h d) -> b h n d", h=4)
            v = rearrange(v, "b n (h d) -> b h n d", h=4)
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


@pytest.mark.parametrize("split", ["layer", "attribute", "literal"])
def test_einops(split: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), Attention(split), Attention(split), nn.Linear(6, 3))
    small = cut(model, torch.randn(2, 7, 5))
    assert [layer.qkv.out_features for layer in (small[1], small[2])] == [36, 36]


def test_einops_keeps_layers_apart() -> None:
    """It remembers what it computed of sizes: two layers of one width must not be tied by that (11 tokens:
    met nowhere else).
    """
    model = nn.Sequential(nn.Linear(5, 6), Attention("attribute"), Attention("attribute"), nn.Linear(6, 3))
    for _ in range(2):
        surgery = surgeon.inspect(model, torch.randn(2, 11, 5))
        plan = surgery.plan(0.5, heads="dims", round_to=1, ignore=["1.qkv"])
        assert plan.apply(model)[2].qkv.out_features == 36


class Checks(nn.Module):
    """Asks whether its input is as wide as it was made for (as the resizing layers of diffusion models
    do).
    """

    def __init__(self, by: str) -> None:
        super().__init__()
        self.channels, self.by, self.conv = 8, by, nn.Conv2d(8, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "assert":
            assert x.shape[1] == self.channels
        elif x.size(1) != self.channels:
            raise ValueError(f"expected {self.channels} channels")
        return self.conv(x)


@pytest.mark.parametrize("by", ["assert", "raise"])
def test_code_that_checks_a_width(by: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Checks(by), nn.GroupNorm(3, 12), nn.Conv2d(12, 3, 1))
    small = cut(model, torch.randn(2, 3, 8, 8))
    assert small[1].channels == small[0].out_channels == 4
    with pytest.raises((AssertionError, ValueError)):  # it still checks
        small[1](torch.randn(2, 8, 8, 8))


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.relu(y) if y.shape[1] == 8 else y.relu())


def test_a_check_whose_answer_changes_nothing() -> None:
    assert cut(Either(), torch.randn(4, 5)).a.out_features == 4


class Divided(nn.Module):
    """The head dim is not kept: the code divides the width by the number of heads (as Emformer and deformable
    attention).
    """

    def __init__(self) -> None:
        super().__init__()
        self.step, self.width, self.heads = 12, 24, 4
        self.q, self.k, self.v, self.out = (
            nn.Linear(6, 24),
            nn.Linear(6, 24),
            nn.Linear(6, 24),
            nn.Linear(24, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, self.width // self.heads).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        return self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", ["whole", "dims"])
def test_a_width_that_is_divided_by_heads(heads: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), Divided(), nn.Linear(6, 3)), torch.randn(2, 7, 5)
    plan = surgeon.inspect(model, x).plan(0.5, heads=heads, round_to=1)  # type: ignore[arg-type]  # the two of them
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    assert (small[1].width, small[1].heads, small[1].step) == (12, 2 if heads == "whole" else 4, 12)


WIDTH = 8


class Kept(nn.Module):
    """A runner that keeps what later layers read, by number (as YOLO's); one of them computes a size in a way
    nobody sees.
    """

    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], WIDTH if bool(x.isfinite().all()) else 1)  # torch.fx cannot trace this

    def __init__(self) -> None:
        super().__init__()
        self.save, wide, hidden = [4, 2], lambda: nn.Linear(8, 8), self.Hidden
        layers = [
            nn.Linear(5, 8),
            nn.ReLU(),
            wide(),
            nn.ReLU(),
            wide(),
            hidden(),
            wide(),
            hidden(),
            nn.Linear(8, 3),
        ]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for number, layer in enumerate(self.layers):
            if number == 5:
                x = kept[4] * kept[2]
            x = layer(x)
            kept.append(x if number in self.save else None)
        return x


def test_an_edit_after_which_the_code_stops_earlier_is_no_help() -> None:
    with pytest.raises(MendError) as error:
        surgeon.shrink(Kept(), 0.25, example_inputs=torch.randn(2, 5), round_to=1, scope="uniform")
    assert (
        "layers.5" in str(error.value)
        and "layers.7" in str(error.value)
        and "NoneType" not in str(error.value)
    )


class Table(nn.Module):
    """Positions learned for longer inputs than today's; the middle of a square of them, or the first few."""

    def __init__(self, square: bool) -> None:
        super().__init__()
        self.square, self.a, self.b = square, nn.Linear(5, 8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(1, 36, 8))
        self.register_buffer("mask", torch.full((36, 36), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.square:
            side = round(n**0.5)
            first = (6 - side) // 2
            table = (
                self.position.to(x.dtype)
                .reshape(1, 6, 6, -1)[:, first : first + side, first : first + side]
                .flatten(1, 2)
            )
        else:
            table = self.position[:, :n]
        y = self.a(x) + table
        return self.b((y @ y.transpose(1, 2) + self.mask[:n, :n]).softmax(-1) @ y)


@pytest.mark.parametrize("square", [False, True])
def test_what_longer_inputs_need_stays(square: bool) -> None:
    model = Table(square)
    small = cut(model, torch.randn(2, 4, 5))
    assert small.position.shape == (1, 36, 4) and small.mask.shape == (36, 36)
    kept = [int(torch.nonzero((model.a.weight == row).all(1))) for row in small.a.weight]
    twin = copy.deepcopy(model)
    with torch.no_grad():  # absent channels: zero all that they hold
        gone = [c for c in range(8) if c not in kept]
        twin.a.weight[gone], twin.a.bias[gone], twin.position[..., gone] = 0, 0, 0
    x = torch.randn(2, 16, 5)
    torch.testing.assert_close(small(x), twin(x))


class Axes(nn.Module):
    """Rotary positions of two axes side by side, each angle for two neighbours (as in Flux)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(6, 24),
            nn.Linear(6, 24),
            nn.Linear(6, 24),
            nn.Linear(24, 6),
        )
        self.heads = 4

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        angles = [
            torch.outer(torch.arange(n) * (axis + 1.0), torch.arange(1.0, 1 + size))
            for axis, size in enumerate((1, 2))
        ]
        turn = torch.cat([angle.repeat_interleave(2, dim=1) for angle in angles], dim=1)
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (t * turn.cos() + self.turned(t) * turn.sin() for t in (q, k))
        return self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack([-imaginary, real], dim=-1).flatten(3)


def test_no_axis_of_rotary_positions_is_emptied() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), Axes(), nn.Linear(6, 3)), torch.randn(2, 7, 5)
    surgery = surgeon.inspect(model, x)
    for heads, width in (("dims", 24), ("whole", 12)):
        plan = surgery.plan(0.5, heads=heads, round_to=1)  # type: ignore[arg-type]  # two of the words
        small = plan.apply(model)
        surgeon.verify(model, small, plan, x)
        assert (small[1].q.out_features, small[1].v.out_features) == (width, 12)


def test_a_parametrized_layer_whose_numbers_change() -> None:
    """Its class says that it has no state of its own: nothing can be derived from that."""
    model = nn.Sequential(
        nn.Conv1d(5, 8, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=4)),
        nn.Conv1d(8, 3, 1),
    )
    torch.manual_seed(0)
    small = surgeon.shrink(model, 0.5, example_inputs=torch.randn(2, 5, 9), round_to=1)
    assert (small[1].groups, small[1].out_channels) == (2, 4)


class Noisy(nn.Module):
    """Noise in every run, and a dropout that never ends (as in Tacotron 2 and StyleGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.strength = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y + torch.randn_like(y) * self.strength + torch.empty(y.shape[0], 1).normal_()
        return self.b(F.dropout(F.dropout(y, 0.5, training=True), 0.3, training=True))


def test_noise_is_the_same_for_both_while_a_cut_is_proved() -> None:
    model, x = Noisy(), torch.randn(4, 5)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    with torch.no_grad():
        small.strength[:2] = small.strength[:2].flip(0)
    with pytest.raises(ProofError):
        surgeon.verify(model, small, plan, x)


class Pathways(nn.Module):
    """Writes its results into the list that it was given (as SlowFast)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList([nn.Linear(5, 8), nn.Linear(4, 8)]), nn.Linear(8, 3)

    def forward(self, x: list[Tensor]) -> Tensor:
        for place, layer in enumerate(self.first):
            x[place] = layer(x[place])
        return self.second(x[0] * x[1])


def test_a_list_that_the_model_writes_into() -> None:
    given = [torch.randn(2, 5), torch.randn(2, 4)]
    small = cut(Pathways(), (given,))
    assert small.second.in_features == 4
    assert [t.shape[1] for t in given] == [5, 4]


def _halves(x: Tensor, size: int) -> Tensor:
    if x.shape[1] % size:  # torch.fx cannot look into this
        raise ValueError("no halves")
    return x.reshape(x.shape[0], -1, size).sum(1)


class Halved(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name, self.a, self.b = by_name, nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_name:
            first, second = self.a(x).split(split_size=4, dim=1)
            return self.b(first * second)
        return self.b(_halves(self.a(x), 4))


@pytest.mark.parametrize("by_name", [False, True])
def test_literals_handed_to_functions(by_name: bool) -> None:
    small = cut(Halved(by_name), torch.randn(4, 5))
    assert (small.a.out_features, small.b.in_features) == (4, 2)


class Merged(nn.Module):
    """Two layers in a row while it trains, one whose weights are made of theirs in eval mode (as SPAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.second, self.both = (
            nn.Linear(5, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 8),
        )
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.training:
            return self.b(self.second(self.first(x)).relu())
        self.both.weight.data = self.second.weight.data.clone() @ self.first.weight.data
        self.both.bias.data = self.second(self.first.bias).detach()
        return self.b(self.both(x).relu())


def test_weights_that_forward_makes_of_others() -> None:
    torch.manual_seed(0)
    model, x = Merged().eval(), torch.randn(4, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = model.both.weight.data_ptr()
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    assert (small.first.weight.shape, small.second.weight.shape, small.both.weight.shape) == (
        (6, 4),
        (4, 6),
        (4, 4),
    )
    assert model.both.weight.data_ptr() == held
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(small.eval()(x), small.train()(x))
    with torch.no_grad():
        small.second.weight[0, 0] += 1e-3
    with pytest.raises(ProofError):
        surgeon.verify(model, small, plan, x)


class Rows(nn.Module):
    """Each channel of each sample is a row: how many there are is the batch times a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(1, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.a(x).view(x.shape[0] * 8, 1)
        return self.c(self.b(rows).view(-1, 16).relu())


def test_literals_that_sizes_are_multiplied_by() -> None:
    model = Rows()
    small = cut(model, torch.randn(4, 5))
    assert (small.a.out_features, small.c.in_features) == (4, 4 * small.b.out_features)
    assert small(torch.randn(3, 5)).shape == (3, 3)


class Bias(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.sizes, self.weight = (3, 3, heads), nn.Parameter(torch.randn(9, heads))

    def table(self) -> Tensor:
        return self.weight.view(self.sizes).permute(2, 0, 1)


class Biased(nn.Module):
    """Attention with biases by a method of a part that is never called, and a width that is what another
    leaves of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.whole = 4, 12, 31
        self.a, self.qkv, self.bias = nn.Linear(5, 31), nn.Linear(12, 36), Bias(4)
        self.b = nn.Linear(31, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, rest = self.a(x).split([self.width, self.whole - self.width], 2)
        q, k, v = self.qkv(x).view(x.shape[0], 3, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) + self.bias.table()).softmax(-1) @ v
        return self.b(torch.cat([mixed.transpose(1, 2).flatten(2), rest], 2))


def test_attributes_of_parts_whose_methods_are_called_and_of_differences() -> None:
    model, x = Biased(), torch.randn(2, 3, 5)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    assert {(edit.module, edit.name, edit.new) for edit in plan.edits if edit.kind == "attribute"} >= {
        ("", "heads", 2), ("bias", "sizes.2", 2), ("", "whole", small.a.out_features),
    }  # fmt: skip
    assert all(edit.kind == "attribute" for edit in plan.edits)


class Ranged(nn.Module):
    """Writes into its input (as RCAN, and many a model that normalises what it gets)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x *= 4
        x -= 1
        return self.b(self.a(x * mask).relu())


def test_a_model_that_writes_into_its_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Ranged(), (torch.rand(4, 5), torch.ones(4, 5))
    before = inputs[0].clone()
    small = cut(model, inputs)
    assert small.a.out_features == 4
    surgeon.bench({"before": model, "small": small}, inputs, backends=["torch"], repeats=3, warmup=1)
    assert torch.equal(inputs[0], before)
    assert surgeon.export(small, tmp_path / "small.onnx", inputs).error < 1e-5
    seen: list[Tensor] = []
    hooks = [
        net.a.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for net in (model, small)
    ]
    surgeon.finetune(small, [(inputs, torch.zeros(4, dtype=torch.long))], teacher=model, epochs=1)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    for hook in hooks:
        hook.remove()
    assert torch.equal(inputs[0], before)


class Basis(nn.Module):
    """Each place has its own grouped kernel, mixed of a few (Zhang et al., KBNet, 2023); written in a
    function of autograd.
    """

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, att: Tensor, groups: int, k: int, w: Tensor) -> Tensor:
            b, c, height, width = x.shape
            kernels = (att.flatten(2).transpose(1, 2) @ w).reshape(
                b, height * width, groups, c // groups, c // groups * k**2
            )
            patches = F.unfold(x, k, padding=k // 2)
            patches = patches.reshape(b, groups, c // groups * k**2, height * width).permute(0, 3, 1, 2)
            return (
                (kernels @ patches.unsqueeze(-1))
                .reshape(b, height * width, c)
                .transpose(1, 2)
                .reshape(b, c, height, width)
            )

    def __init__(self) -> None:
        super().__init__()
        self.k, self.g, self.att = 3, 4, nn.Conv2d(8, 6, 1)
        self.w = nn.Parameter(torch.randn(1, 6, 8 * 2 * 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.Mixed.apply(x, self.att(x), self.g, self.k, self.w)


class Listed(nn.Module):
    """The code splits by a list of widths, and checks their sum, which nothing holds."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [8, 16]
        self.stages, self.head = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 16)]), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(x)
        y = torch.cat(found, 1)
        assert y.shape[1] == sum(self.widths)
        first, second = torch.split(y, self.widths, 1)
        return self.head(torch.cat([first, second * 2], 1))


def test_a_sum_of_numbers_that_are_kept() -> None:
    assert cut(Listed(), torch.randn(4, 5)).widths == [4, 8]


class WritesIntoParts(nn.Module):
    """Numbers in code that assigns to slices and adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(5, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        out = torch.zeros(x.shape[0], 16)
        out[:, :8] = self.b(x)
        out[:, 8:] += y[:, 8:]
        y[..., 4:8] = y[..., 4:8].relu()
        part = y[:, :8]
        part *= 2  # y changes with it
        return self.c(out * y)


def test_numbers_in_code_that_assigns_to_slices() -> None:
    """The code stops at the first of them, so a change that shows nothing then is tried again when the code
    comes further.
    """
    model, x = WritesIntoParts(), torch.randn(4, 5)
    small = cut(model, x)
    assert (small.a.out_features, small.b.out_features, small.c.in_features) == (8, 4, 8)
    assert torch.equal(torch.jit.script(small)(x), small(x))


def test_a_wrong_edit_that_ends_the_run_early_is_no_help() -> None:
    """A kernel of 6 explains most sizes; with it the run ends before those that it makes wrong."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Basis(), nn.ReLU(), Basis(), nn.ReLU(), Basis(), nn.Conv2d(8, 3, 1)
    )
    small = cut(model, torch.randn(2, 3, 5, 5))
    assert [(small[i].g, small[i].k, small[i].att.in_channels) for i in (1, 3, 5)] == [(2, 3, 4)] * 3


class Global(nn.Module):
    """Some heads attend to all, the others to neighbours; here there are no others (as in Performer)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out, self.heads, self.far = nn.Linear(5, 16), nn.Linear(16, 3), 4, 4

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        far, near = q[:, : self.far], q[:, self.far :]
        parts = [(part @ part.transpose(2, 3)).softmax(-1) @ part for part in (far, near) if part.numel()]
        return self.out(torch.cat(parts, dim=1).transpose(1, 2).flatten(2))


def test_a_part_that_is_empty() -> None:
    small = cut(Global(), torch.randn(2, 6, 5))
    assert (small.heads, small.far, small.q.out_features) == (2, 2, 8)


class Filled(nn.Module):
    """Pads what is missing of a width that it knows: nothing, so far (as x-transformers' linear biases)."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.a, self.b = 8, nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.pad(y, (0, self.total - y.shape[1])).relu())


def test_a_number_that_a_width_is_taken_from() -> None:
    small = cut(Filled(), torch.randn(4, 5))
    assert (small.total, small.a.out_features, small.b.in_features) == (4, 4, 4)


class Plain(nn.Module):
    """Literals in a method that others override and call by `super()`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return self.a(x).view(len(x), 4, 4, *x.shape[2:]).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.features(x).reshape(len(x), 16, *x.shape[2:]))


class Middle(Plain):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Last(Middle):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return super(Last, self).forward(x).reshape(len(x), 8, -1)  # noqa: UP008  # as older code has it


@pytest.mark.parametrize("kind", [Middle, Last])
def test_literals_of_methods_that_are_called_by_super(kind: type[Plain], tmp_path: Path) -> None:
    model, x = kind().eval(), torch.randn(2, 3, 5, 5)
    small = cut(model, x)
    assert isinstance(small, kind)
    assert small.a.out_channels == 8
    surgeon.save(small, tmp_path / "small")
    torch.testing.assert_close(surgeon.load(tmp_path / "small", kind)(x), small(x))
    smaller = cut(small, x)  # edited again
    assert smaller.a.out_channels == 4
    assert smaller.features(x).shape[1:3].numel() == 4
