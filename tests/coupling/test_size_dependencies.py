"""Parts of a dim that the model's code computes from its size: what is cut must leave them the same share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrong import wrong_cuts

import surgeon
from surgeon.errors import BudgetError, CaptureError, ProofError


def shifted(x: Tensor) -> Tensor:
    """An eighth of the channels is taken from the next frame, an eighth from the last (Lin et al., TSM,
    2019).
    """
    frames, c, h, w = x.shape
    x, fold = x.view(-1, 4, c, h, w), c // 8
    out = torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.view(frames, c, h, w)


def partly(x: Tensor) -> Tensor:
    """A quarter of the channels goes another way (Chen et al., FasterNet, 2023)."""
    quarter = x.shape[1] // 4
    first, rest = x.split([quarter, x.shape[1] - quarter], dim=1)
    return torch.cat([first.roll(1, dims=2), rest], dim=1)


def from_behind(x: Tensor) -> Tensor:
    eighth = x.shape[1] // 8
    return torch.cat([x[:, :-eighth], x.narrow(1, 7 * eighth, eighth).roll(1, dims=3)], dim=1)


def narrowed(x: Tensor) -> Tensor:
    eighth = x.size(1) // 8
    return torch.cat(
        [x.narrow(dim=1, start=0, length=eighth).flip(2), torch.narrow(x, 1, eighth, 7 * eighth)], dim=1
    )


class Parts(nn.Module):
    """Something is done to parts of 16 channels, of which one end has small weights: scores alone would take
    all there.
    """

    def __init__(self, mix: Callable[[Tensor], Tensor], small: slice = slice(0, 8)) -> None:
        super().__init__()
        self.mix, self.first, self.second = (
            mix,
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 5, 3, padding=1),
        )
        with torch.no_grad():
            self.first.weight[small] /= 50

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix(self.first(x)).relu())


def kept(plan: surgeon.Plan) -> list[int]:
    return [int(i) for i in plan.kept["first.weight"][0]]


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(
    ("mix", "ends"), [(shifted, (2, 4, 16)), (partly, (4, 16)), (from_behind, (14, 16)), (narrowed, (2, 16))]
)
def test_parts_that_the_code_computes_keep_their_share(
    mix: Callable[[Tensor], Tensor], ends: tuple[int, ...], scope: str
) -> None:
    model, x = Parts(mix), torch.randn(8, 3, 6, 6)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, scope=scope, round_to=1)  # type: ignore[arg-type]  # two of the words
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, x).error < 1e-9
    stays = kept(plan)
    assert len(stays) == small.first.out_channels == 8
    assert [sum(i < end for i in stays) for end in ends] == [end // 2 for end in ends]


def test_parts_of_which_no_smaller_width_has_the_share_stay() -> None:
    def third(x: Tensor) -> Tensor:
        return torch.cat([x[:, : 3 * x.shape[1] // 16].flip(2), x[:, 3 * x.shape[1] // 16 :]], dim=1)

    model, x = Parts(third), torch.randn(2, 3, 6, 6)
    surgery = surgeon.inspect(model, x)
    assert "no smaller width has the same share" in str(surgery)
    with pytest.raises(BudgetError, match="no group of channels"):
        surgery.plan(0.5)


class AlignedRun(nn.Module):
    """Takes as many channels of one layer as another one has: both keep the same share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 20)
        self.c, self.d, self.e = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(12, 3)
        with torch.no_grad():
            self.b.weight /= 50

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        size = a.shape[1]
        return self.c(a) + self.d(b[:, :size]) + self.e(b[:, size:])


def test_a_part_as_long_as_another_layer_is_wide() -> None:
    torch.manual_seed(0)
    model, x = AlignedRun(), torch.randn(4, 5)
    surgery = surgeon.inspect(model, x)
    for ratio in (0.25, 0.5, 0.75):
        plan = surgery.plan(ratio, scope="global", round_to=1)
        small = plan.apply(model)
        assert surgeon.verify(model, small, plan, x).error < 1e-9
        assert sum(i < 8 for i in plan.kept["b.weight"][0]) == small.a.out_features == small.d.in_features < 8


class SideBySide(nn.Module):
    """Two attentions on halves of one layer, one of them through anchors (Li et al., GRL, 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.anchor = nn.Linear(5, 16), nn.Linear(16, 48), nn.Linear(16, 8)
        self.out, self.last, self.heads = nn.Linear(16, 16), nn.Linear(16, 3), 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, n, c = x.shape
        left, right = torch.split(self.qkv(x), c * 3 // 2, dim=-1)
        q, k, v = left.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        first = (q @ k.transpose(2, 3)).softmax(-1) @ v
        q, k, v = right.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        anchor = self.anchor(x).reshape(b, n, self.heads, -1).permute(0, 2, 1, 3)
        second = (q @ anchor.transpose(2, 3)).softmax(-1) @ ((anchor @ k.transpose(2, 3)).softmax(-1) @ v)
        return self.last(
            x
            + self.out(torch.cat([t.transpose(1, 2).reshape(b, n, c // 2) for t in (first, second)], dim=-1))
        )


@pytest.mark.parametrize(("heads", "left"), [("whole", 1), ("dims", 2)])
def test_heads_and_their_dims_are_alternatives_in_parts_that_keep_their_share(heads: str, left: int) -> None:
    torch.manual_seed(0)
    model, x = SideBySide(), torch.randn(2, 6, 5)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, heads=heads, round_to=1)  # type: ignore[arg-type]  # two of the words
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    widths = [layer.out_features for layer in (small.first, small.qkv, small.anchor)]
    assert (widths, small.out.in_features, small.heads) == ([8, 24, 4], 8, left)


class Spectral(nn.Module):
    """Products with the low frequencies, written into zeros (Li et al., Fourier Neural Operator, 2021)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.width, self.modes = width, modes
        self.low, self.high = (
            nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        found, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros(x.shape[0], self.width, *found.shape[2:], dtype=torch.cfloat)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", found[:, :, :m, :m], self.low)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", found[:, :, -m:, :m], self.high)
        return torch.fft.irfft2(out, s=x.shape[2:])


class Operator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spectral = nn.Conv2d(2, 8, 1), nn.ModuleList(Spectral(8, 3) for _ in range(2))
        self.beside, self.last = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2)), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for spectral, beside in zip(self.spectral, self.beside, strict=True):
            x = F.gelu(spectral(x) + beside(x))
        return self.last(x)


def test_spectral_convolutions() -> None:
    torch.manual_seed(0)
    model, x = Operator(), torch.randn(2, 2, 10, 10)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, x)
    assert [layer.width for layer in small.spectral] == [4, 4] and small.spectral[0].low.shape == (4, 4, 3, 3)
    stays = [torch.tensor(plan.kept["spectral.0.high"][dim]) for dim in (0, 1)]
    assert torch.equal(small.spectral[0].high, model.spectral[0].high[stays[0]][:, stays[1]])
    wrong = list(wrong_cuts(model, plan))
    assert {name for _, bad in wrong for name in bad.kept if bad.kept[name] != plan.kept[name]} == set(
        plan.kept
    )
    for cut, bad in wrong:
        with pytest.raises(
            ProofError, match=r"relative error|cannot be proved at op _fft_c2r"
        ):  # frequencies that are half there
            surgeon.verify(model, cut, bad, x)


def test_a_copy_onto_what_it_reads_is_refused() -> None:
    class Onto(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.apart, self.a, self.b = apart, nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            half = x.shape[2] // 2
            if self.apart:
                x[:, :2, :half] = x[:, 2:, :half]
            else:
                x[:, 1:, :half] = x[:, :-1, :half]  # too hard for torch's own check
            return self.b(x)

    with pytest.raises(CaptureError, match="overlaps with it") as error:
        surgeon.shrink(Onto(False), 0.5, example_inputs=torch.randn(2, 4, 5))
    assert "x[:, 1:, :half] =" in error.value.where and "clone" in error.value.fix
    assert (
        surgeon.shrink(Onto(True), 0.5, example_inputs=torch.randn(2, 4, 5), round_to=1).a.out_features == 4
    )
