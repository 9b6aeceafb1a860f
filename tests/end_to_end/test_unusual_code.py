"""Awkward code in miniature: what real models and random graphs once broke on. Each must be cut, proved, and
lose channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from motifs import net
from torch import Tensor, nn

import surgeon
from surgeon.errors import MendError


class Remembers(nn.Module):
    """Sizes read from a part, and checked before they are used (as in RAFT)."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size, self.layer = 12, nn.Linear(12, 12)

        def forward(self, h: Tensor) -> Tensor:
            return self.layer(h).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.cell, self.out = nn.Linear(5, 20), self.Cell(), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        hidden = self.cell.hidden_size
        if x.shape[1] <= hidden:
            raise ValueError("the encoder must give more than the hidden state")
        h, context = torch.split(x, [hidden, x.shape[1] - hidden], dim=1)
        return self.out(torch.cat([self.cell(h), context], 1))


class Shared(nn.Module):
    """A stage number that looks like a size: changing it leads the code astray (as in CvT)."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.flags, self.a, self.b = 2, [False, False, True], nn.Linear(5, 8), nn.Linear(8, 3)
        self.heads, self.token = 2, nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.flags[self.stage]:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        q = x.view(x.shape[0], x.shape[1], self.heads, 4).transpose(1, 2)
        return self.b((q @ q.transpose(2, 3)).softmax(-1).matmul(q).transpose(1, 2).flatten(2))


class Scaled(nn.Module):
    """The scale of attention as a tensor that the code makes of a width (as in DeBERTa and RAFT)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.b = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        return self.b(q @ k.transpose(1, 2) / torch.sqrt(torch.tensor(q.size(-1), dtype=torch.float)))


class Router(nn.Module):
    """A mixture of experts: the two best of three for each token, chosen by value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route, self.b = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(0, 1)
        weight, chosen = self.route(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return self.b(out)


class Threshold(nn.Module):
    """Boxes above a threshold, best first: the number of rows hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.box = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 4)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a((x - torch.tensor([0.485, 0.456, 0.406, 0.3, 0.1]))[0] / self.mean).relu()
        score = self.score(x)[:, 0].sigmoid()
        keep = torch.nonzero(score > 0.5)[:, 0]
        order = score[keep].argsort(descending=True)
        return self.box(x)[keep][order], score[keep][order]


class Checked(nn.Module):
    """Many norms of one's own, which give torch's function a size that no op is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Linear(5, 8),
            nn.Sequential(*(self.Norm(8) for _ in range(70))),
            nn.Linear(8, 3),
        )
        self.register_buffer("open", torch.tensor([0.0, -torch.inf]))

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.normalized_shape, self.weight = (width,), nn.Parameter(torch.randn(width))

        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class Rotated(nn.Module):
    """Rotary positions as products with complex numbers, as in Meta's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.heads = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(5, 3), 2
        angles = torch.outer(torch.arange(6.0), 1 / 100 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turn[:, None]).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.turned(f(x).unflatten(-1, (self.heads, -1))).transpose(1, 2) for f in (self.q, self.k))
        return self.o((q @ k.transpose(2, 3)).softmax(-1).sum(1) @ x)


class Queries(nn.Module):
    """Learned queries, repeated for the batch, ask a transformer (as in DETR's demo)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.queries = nn.Linear(5, 16), nn.Parameter(torch.randn(3, 16))
        self.transformer = nn.Transformer(16, 2, 1, 1, 24)
        self.b = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.queries.unsqueeze(1).repeat(1, x.shape[0], 1)
        return self.b(self.transformer(self.a(x).transpose(0, 1), asked)).transpose(0, 1)


class Pooling(nn.Module):
    """Learned queries ask the tokens, and what they get goes side by side into a layer."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first = batch_first
        self.a, self.queries = nn.Linear(5, 16), nn.Parameter(torch.randn(4, 16))
        self.m, self.b = nn.MultiheadAttention(16, 4, batch_first=batch_first), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.first:
            return self.b(self.m(self.queries.expand(x.shape[0], -1, -1), x, x)[0].flatten(1))
        queries, x = self.queries[:, None].expand(-1, x.shape[0], -1), x.transpose(0, 1)
        return self.b(self.m(queries, x, x, need_weights=False)[0].transpose(0, 1).reshape(-1, 64))


def remember(s: Any, x: Tensor) -> Tensor:
    if not hasattr(s, "table"):  # made at the first run and kept
        s.table = torch.arange(6)[:, None] - torch.arange(6)[None]
    return s.b(s.a(x)) * (s.table.sum() + 2)


def counted(s: Any, x: Tensor) -> Tensor:
    number = torch.tensor(1.0)
    for _ in range(1200):  # each step reads the one before twice
        number = (number + number) / 2
    return s.b(s.a(x) * number)


def neighbours(x: Tensor) -> Tensor:
    """A graph layer: each edge brings its source's features to its target."""
    source, target = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])
    message = x.index_select(0, source)
    summed = x.new_zeros(x.shape).scatter_add_(0, target[:, None].expand_as(message), message)
    degree = x.new_zeros(len(x)).scatter_add_(0, target, x.new_ones(len(target))).pow_(-0.5)
    return summed * degree[:, None]


LINEAR = {"a": lambda: nn.Linear(5, 8), "b": lambda: nn.Linear(8, 3)}
HALF = {"a": lambda: nn.Linear(5, 8), "b": lambda: nn.Linear(4, 3)}
CONV = {"a": lambda: nn.Conv2d(3, 8, 3, padding=1), "b": lambda: nn.Linear(8, 3)}
FLAT, ROWS, IMAGE = (4, 5), (2, 6, 5), (2, 3, 6, 6)

AWKWARD: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("logsumexp", net(lambda s, x: s.b(s.a(x) - s.a(x).logsumexp(1, keepdim=True)), **LINEAR), FLAT),
    ("the greatest of all", net(lambda s, x: s.b(s.a(x) / s.a(x).max()), **LINEAR), FLAT),
    ("every second", net(lambda s, x: s.b(s.a(x)[:, 1::2]), **HALF), FLAT),
    ("padded, then normalised", net(lambda s, x: s.b(F.layer_norm(F.pad(s.a(x), (0, 4)), (12,))), a=LINEAR["a"],
                                    b=lambda: nn.Linear(12, 3)), FLAT),
    ("padded, then normalised with a scale", net(lambda s, x: s.b(s.n(F.pad(s.a(x), (0, 4)))), a=LINEAR["a"],
                                                 n=lambda: nn.LayerNorm(12), b=lambda: nn.Linear(12, 3)), FLAT),
    ("padded heads", net(lambda s, x: s.b(s.c(F.pad(s.a(x), (0, 8)).unflatten(-1, (3, -1)).softmax(-1).flatten(1))),
                         a=lambda: nn.Linear(5, 16), c=lambda: nn.Linear(24, 8), b=LINEAR["b"]), FLAT),
    ("norm without scale",
     lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)), FLAT),
    ("a size that a function checks", Checked, FLAT),
    ("divided by an expanded norm", net(lambda s, x: s.b(F.normalize(s.a(x))), **LINEAR), FLAT),
    ("coordinates beside an image",
     net(lambda s, x: s.b(s.c(torch.cat([s.a(x).view(4, 1, 4, 4), torch.linspace(0, 1, 4).expand(4, 1, 4, 4)], 1)).mean((2, 3))),
         a=lambda: nn.Linear(5, 16), c=lambda: nn.Conv2d(2, 8, 1), b=LINEAR["b"]), FLAT),
    ("rms norm without scale",
     lambda: nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8, eps=1e-5, elementwise_affine=False), nn.Linear(8, 3)), FLAT),
    ("rms norm without epsilon", lambda: nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3)), FLAT),
    ("unfold", net(lambda s, x: s.b(F.unfold(s.a(x), 3).transpose(1, 2)), a=CONV["a"], b=lambda: nn.Linear(72, 3)), IMAGE),
    ("fold", net(lambda s, x: s.b(F.fold(F.unfold(s.a(x), 3), (6, 6), 3).mean((2, 3))), **CONV), IMAGE),
    ("rows by mask", net(lambda s, x: s.b(s.masked(s.a(x))), masked=lambda: Masked(), **LINEAR), ROWS),
    ("convolution over channels", net(lambda s, x: s.b(s.c(torch.stack([s.a(x), s.a(x) * 2], 1))[:, 0]),
                                      c=lambda: nn.Conv1d(2, 1, 1), **LINEAR), FLAT),
    ("made once and kept", net(remember, **LINEAR), FLAT),
    ("a number made in many steps", net(counted, **LINEAR), FLAT),
    ("attention on inputs that stay",
     net(lambda s, x: s.b(s.m(x, x, x, need_weights=False)[0]), m=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
         b=lambda: nn.Linear(6, 3)), (2, 4, 6)),
    ("an entry of which only the shape is asked",
     net(lambda s, x: s.b(s.a(x)) * len(s.a(x)[:, -1]), **LINEAR), FLAT),
    ("unflatten", net(lambda s, x: s.b(s.a(x).unflatten(-1, (2, -1)).sum(1)), **HALF), FLAT),
    ("narrow", net(lambda s, x: s.b(s.a(x).narrow(1, 0, 4)), **HALF), FLAT),
    ("sizes of a part", Remembers, FLAT),
    ("a number that is no size", Shared, ROWS),
    ("a scale in a tensor", Scaled, ROWS),
    ("mixture of experts", Router, ROWS),
    ("boxes above a threshold", Threshold, ROWS),
    ("complex rotary positions", Rotated, ROWS),
    ("learned queries", Queries, ROWS),
    ("attention pooling", lambda: Pooling(True), ROWS),
    ("attention pooling, sequence first", lambda: Pooling(False), ROWS),
    ("in-place ops of other names", net(lambda s, x: s.b(s.a(x).exp().pow_(-0.5).ldexp_(torch.ones(8)).floor_divide_(0.01)),
                                        **LINEAR), FLAT),
    ("sums over neighbours", net(lambda s, x: s.b(neighbours(s.a(x))), **LINEAR), FLAT),
    ("Fourier mixing", net(lambda s, x: s.b(s.a(x) + torch.fft.fft(s.a(x), dim=1).real), **LINEAR), ROWS),
    ("the greatest channel", net(lambda s, x: s.b((s.a(x) * s.a(x).max(1, True)[0].sigmoid()).mean((2, 3))), **CONV), IMAGE),
    ("bilinear", net(lambda s, x: s.b(s.c(s.a(x), s.d(x))), a=LINEAR["a"], d=lambda: nn.Linear(5, 6),
                     c=lambda: nn.Bilinear(8, 6, 8), b=LINEAR["b"]), FLAT),
    ("spectral norm", net(lambda s, x: s.b(s.a(x)), a=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)),
                          b=LINEAR["b"]), FLAT),
]  # fmt: skip


class Masked(nn.Module):
    """Rows written through a mask."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[torch.arange(x.shape[1])[None].expand(x.shape[0], -1) % 2 == 0] = 0.0
        return x


@pytest.mark.parametrize(("make", "shape"), [case[1:] for case in AWKWARD], ids=[case[0] for case in AWKWARD])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_awkward_code_is_cut_and_proved(
    make: Callable[[], nn.Module], shape: tuple[int, ...], ratio: float
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(ratio, criterion="random", seed=3)
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, x)
    assert proof.error < 1e-9
    assert sum(p.numel() for p in small.parameters()) == plan.params < surgery.params


class _Aligned(nn.Module):
    """A kernel that takes widths of whole blocks only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.shape[-1] % 8:
            raise RuntimeError("strides should be multiple of 16 bytes")
        return self.b(y.relu())


def test_what_the_code_stopped_with_is_said() -> None:
    model, x = _Aligned().eval(), torch.randn(2, 4)
    with pytest.raises(MendError, match="strides should be multiple of 16 bytes"):
        surgeon.shrink(model, 0.25, example_inputs=x, round_to=1)
    assert surgeon.shrink(model, 0.5, example_inputs=x, round_to=8).a.out_features == 8


class Tries(nn.Module):
    """Calls ops that fail and goes on without them; puts NaN where a number is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        try:
            y = y * (x @ torch.ones(7, 1))
        except RuntimeError:
            y = y * 2
        try:
            y = y + x.reshape(-1, 7).sum()
        except RuntimeError:
            y = y + 1
        missing = torch.full_like(y, torch.nan)
        return self.b(
            torch.where(y > 0, y, missing).nan_to_num(0.5) + y.masked_fill(y < 0, torch.nan).nan_to_num()
        )


def test_ops_that_fail_and_numbers_that_are_none() -> None:
    torch.manual_seed(0)
    model, x = Tries().eval(), torch.randn(4, 6)
    small = surgeon.shrink(model, 0.5, example_inputs=x, round_to=1)
    assert small.a.out_features == 8 and small(x).isfinite().all()
