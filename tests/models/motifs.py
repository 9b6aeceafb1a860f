"""Small models, one per wiring motif, each with the groups that must be found in it.

`groups` maps a group's name to "steps x balanced sets: slots", the slots sorted by name. It was written from the
wiring, not from what surgeon printed: read a motif's forward and its groups side by side. To add a motif, add
a class and a row in MOTIFS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Motif:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, str]
    edits: tuple[str, ...] = ()  # places in the code that must change, by name


def conv(i: int, o: int, k: int = 1, **kw: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


class Net(nn.Module):
    """Layers by keyword and a forward given as a function of (self, x)."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def net(run: Callable[[Any, Tensor], Any], **layers: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(run, **{name: layer() for name, layer in layers.items()})


class Heads(nn.Module):
    """[N, T, C] as [N, heads, T, C / heads]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FrozenBatchNorm(nn.Module):
    """A batch norm of buffers, as detectors use it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class Flatten(nn.Module):
    """`x.view(-1, 8 * 3 * 3)`, the literal that users have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 3), nn.Linear(72, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, 8 * 3 * 3))


class HiddenDim(nn.Module):
    """A width kept as an attribute and used in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_dim = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(-1, self.hidden_dim))


class OptionA(nn.Module):
    """The shortcut without parameters: a strided slice, padded with zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), nn.Conv2d(8, 16, 3, stride=2, padding=1), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = conv(3, 8, 3), conv(8, 4), conv(4, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.b(x * gate)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gamma)


class FusedQKV(nn.Module):
    """Self-attention with one projection for q, k and v; `order` is how its output is cut."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.num_heads, self.head_dim = order, 4, 6
        self.embed = nn.Linear(5, 16)
        self.qkv, self.proj, self.out = nn.Linear(16, 72), nn.Linear(24, 16), nn.Linear(16, 3)
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        if self.order == "3hd":
            q, k, v = (
                self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            )
        elif self.order == "h3d":
            q, k, v = (
                self.qkv(x).reshape(b, n, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
            )
        else:  # split into thirds, then heads
            q, k, v = (
                t.reshape(b, n, self.num_heads, self.head_dim).transpose(1, 2)
                for t in self.qkv(x).chunk(3, -1)
            )
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim)
        return self.out(x + self.proj(y))


class SeparateQKV(nn.Module):
    """Three projections and the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.q, self.k, self.v, self.o = (
            nn.Linear(5, 24),
            nn.Linear(5, 24),
            nn.Linear(5, 24),
            nn.Linear(24, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class GroupedQueries(nn.Module):
    """Six heads of queries, three of keys and values, in the fused kernel; sizes from the head dim, as in
    Llama.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4
        self.q, self.k, self.v, self.o = (
            nn.Linear(5, 24),
            nn.Linear(5, 12),
            nn.Linear(5, 12),
            nn.Linear(24, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class RepeatedKeys(nn.Module):
    """Eight heads of queries, four of keys and values, which are repeated by a number that the code computes
    from both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.served, self.head_dim = 8, 4, 4
        self.q, self.k, self.v, self.o = (
            nn.Linear(5, 32),
            nn.Linear(5, 16),
            nn.Linear(5, 16),
            nn.Linear(32, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (
            f(x).view(batch, length, self.served, self.head_dim).transpose(1, 2) for f in (self.k, self.v)
        )
        k, v = (t.repeat_interleave(self.heads // self.served, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class MultiHead(nn.Module):
    def __init__(self, **kw: Any) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 16), nn.MultiheadAttention(16, 4, batch_first=True, **kw)
        self.key = nn.Linear(5, kw.get("kdim", 16))
        self.out = nn.Linear(16, 3)
        self.own_keys = bool(kw)

    def forward(self, x: Tensor) -> Tensor:
        q = self.embed(x)
        k = self.key(x) if self.own_keys else q
        return self.out(q + self.attention(q, k, k, need_weights=False)[0])


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, written as a batch norm of the weight in training mode (as NFNets do)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        )
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, padding=1)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones; only its sequence is used."""

    def __init__(self, kind: type[nn.RNNBase], **kw: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(5, 6), kind(6, 8, batch_first=True, **kw)
        width = (kw.get("proj_size") or 8) * (2 if kw.get("bidirectional") else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(x))[0])


class Loop(nn.Module):
    """A loop over `range(self.depth)`, which must not be taken for a width."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 8
        self.first, self.layers, self.last = (
            nn.Linear(5, 8),
            nn.ModuleList(nn.Linear(8, 8) for _ in range(8)),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in range(self.depth):
            x = x + self.layers[i](x).relu()
        return self.last(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first = nn.Linear(5, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.first(x)).relu()))


class Dict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8, 3), conv(8, 4), conv(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a(x)
        return {"boxes": self.b(x), "scores": self.c(x)}


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class WriteThroughView(nn.Module):
    """Writes into a part of a tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.part = 4
        self.a, self.b, self.c = conv(3, 8, 3), conv(8, 4), conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).clone()
        y[:, : self.part] = self.c(x)
        return self.b(y)


class Halves(nn.Module):
    """Literal bounds of slices; with half of the channels gone, torch leaves out the first slice, which takes
    everything then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8, 3), conv(4, 5), conv(4, 5), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        left, right = x[:, :4], x[:, 4:]
        return torch.cat([self.b(left.relu()) + self.c(right), self.d(torch.cat([left, right], 1))], 1)


IMAGE = (2, 3, 6, 6)
SEQUENCE = (2, 7, 5)
AB = {"a": lambda: conv(3, 8, 3), "b": lambda: conv(8, 4)}

MOTIFS = [
    Motif(
        "chain",
        net(lambda s, x: s.b(s.a(x).relu()), **AB),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "batch_norm",
        net(lambda s, x: s.b(s.n(s.a(x)).relu()), **AB, n=lambda: nn.BatchNorm2d(8)),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.running_mean[0] n.running_var[0] n.weight[0]",
        },
    ),
    Motif(
        "frozen_batch_norm",
        net(lambda s, x: s.b(s.n(s.a(x))), **AB, n=lambda: FrozenBatchNorm(8)),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.running_mean[0] n.running_var[0] n.weight[0]",
        },
    ),
    Motif(
        "residual",
        net(
            lambda s, x: s.c(s.a(x) + s.b(s.a(x)).relu()),
            a=lambda: conv(3, 8),
            b=lambda: conv(8, 8, 3),
            c=lambda: conv(8, 4),
        ),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.bias[0] b.weight[0] b.weight[1] c.weight[1]"},
    ),
    Motif(
        "concat",
        net(
            lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)),
            a=lambda: conv(3, 8),
            b=lambda: conv(3, 6),
            c=lambda: conv(14, 4),
        ),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] c.weight[1]",
            "b.weight[0]": "6x1: b.bias[0] b.weight[0] c.weight[1]",
        },
    ),
    Motif(
        "concat_with_input",
        net(lambda s, x: s.c(torch.cat([x, s.a(x)], 1)), a=lambda: conv(3, 8), c=lambda: conv(11, 4)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] c.weight[1]"},
    ),
    Motif(
        "concat_twice",
        net(lambda s, x: s.c(torch.cat([s.a(x)] * 2, 1)), a=lambda: conv(3, 8), c=lambda: conv(16, 4)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] c.weight[1]"},
    ),
    Motif(
        "dense",
        net(
            lambda s, x: s.c(torch.cat([y := s.a(x), s.b(y)], 1)),
            a=lambda: conv(3, 8),
            b=lambda: conv(8, 6, 3),
            c=lambda: conv(14, 4),
        ),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] c.weight[1]",
            "b.weight[0]": "6x1: b.bias[0] b.weight[0] c.weight[1]",
        },
    ),
    Motif(
        "chunk",
        net(
            lambda s, x: s.b((h := s.a(x).chunk(2, 1))[0].relu()) + s.c(h[1]),
            a=lambda: conv(3, 8),
            b=lambda: conv(4, 3),
            c=lambda: conv(4, 3),
        ),
        IMAGE,
        {"a.weight[0]": "4x2: a.bias[0] a.weight[0] b.weight[1] c.weight[1]"},
    ),
    Motif(
        "literal_halves",
        Halves,
        IMAGE,
        {"a.weight[0]": "4x2: a.bias[0] a.weight[0] b.weight[1] c.weight[1] d.weight[1]"},
        ("forward:0", "forward:1"),
    ),
    Motif(
        "split_unequal",
        net(
            lambda s, x: s.b((h := s.a(x).split([6, 2], 1))[0].relu()) + s.c(h[1]),
            a=lambda: conv(3, 8),
            b=lambda: conv(6, 3),
            c=lambda: conv(2, 3),
        ),
        IMAGE,
        {
            "a.weight[0]": "6x1: a.bias[0] a.weight[0] b.weight[1]",
            "a.weight[0] #2": "2x1: a.bias[0] a.weight[0] c.weight[1]",
        },
        ("split:0:0.1.0", "split:0:0.1.1"),
    ),
    Motif(
        "gated_linear_unit",
        net(lambda s, x: s.b(F.glu(s.a(x), 1)), a=lambda: conv(3, 16), b=lambda: conv(8, 3)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "two_consumers",
        net(
            lambda s, x: (s.b(y := s.a(x)), s.c(y)),
            a=lambda: conv(3, 8),
            b=lambda: conv(8, 4),
            c=lambda: conv(8, 2),
        ),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] c.weight[1]"},
    ),
    Motif("dict_output", Dict, IMAGE, {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] c.weight[1]"}),
    Motif(
        "tied_weights",
        Tied,
        (4, 5),
        {
            "first.weight[0]": "8x1: a.bias[0] a.weight[0] a.weight[1] b.bias[0] c.weight[1] first.bias[0] first.weight[0]"
        },
    ),
    Motif(
        "module_twice",
        net(
            lambda s, x: s.c(s.b(s.b(s.a(x)).relu())),
            a=lambda: conv(3, 8),
            b=lambda: conv(8, 8),
            c=lambda: conv(8, 4),
        ),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.bias[0] b.weight[0] b.weight[1] c.weight[1]"},
    ),
    Motif(
        "depthwise",
        net(lambda s, x: s.b(s.d(s.a(x))), **AB, d=lambda: conv(8, 8, 3, groups=8)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] d.bias[0] d.weight[0]"},
        ("groups",),
    ),
    Motif(
        "depthwise_multiplier",
        net(
            lambda s, x: s.b(s.d(s.a(x))),
            a=lambda: conv(3, 8),
            d=lambda: conv(8, 24, 3, groups=8),
            b=lambda: conv(24, 4),
        ),
        IMAGE,
        {
            "a.weight[0] rows": "8x1: a.bias[0] a.weight[0] b.weight[1] d.bias[0] d.weight[0]",
            "d.weight[0] columns": "3x8: b.weight[1] d.bias[0] d.weight[0]",
        },
        ("groups",),
    ),
    Motif(
        "grouped",
        net(
            lambda s, x: s.b(s.d(s.a(x))),
            a=lambda: conv(3, 16),
            d=lambda: conv(16, 24, 3, groups=4),
            b=lambda: conv(24, 4),
        ),
        IMAGE,
        {
            "a.weight[0] rows": "4x1: a.bias[0] a.weight[0] b.weight[1] d.bias[0] d.weight[0]",
            "a.weight[0] columns": "4x1: a.bias[0] a.weight[0] d.weight[1]",
            "d.weight[0] columns": "6x4: b.weight[1] d.bias[0] d.weight[0]",
        },
        ("groups",),
    ),
    Motif(
        "transposed",
        net(
            lambda s, x: s.b(s.t(s.a(x))),
            **{**AB, "b": lambda: conv(6, 4)},
            t=lambda: nn.ConvTranspose2d(8, 6, 2, stride=2),
        ),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] t.weight[0]",
            "t.weight[1]": "6x1: b.weight[1] t.bias[0] t.weight[1]",
        },
    ),
    Motif(
        "transposed_grouped",
        net(
            lambda s, x: s.b(s.t(s.a(x))),
            a=lambda: conv(3, 16),
            t=lambda: nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4),
            b=lambda: conv(24, 4),
        ),
        IMAGE,
        {
            "a.weight[0] rows": "4x1: a.bias[0] a.weight[0] b.weight[1] t.bias[0] t.weight[0]",
            "a.weight[0] columns": "4x4: a.bias[0] a.weight[0] t.weight[0]",
            "t.weight[1] columns": "6x1: b.weight[1] t.bias[0] t.weight[1]",
        },
        ("groups",),
    ),
    Motif(
        "flatten_literal",
        Flatten,
        (2, 3, 3, 3),
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
        ("forward:1",),
    ),
    Motif(
        "flatten_channels_last",
        net(
            lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).flatten(1)),
            a=lambda: conv(3, 8),
            b=lambda: nn.Linear(72, 4),
        ),
        (2, 3, 3, 3),
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "hidden_dim",
        HiddenDim,
        (4, 6),
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
        ("hidden_dim",),
    ),
    Motif(
        "option_a",
        OptionA,
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.bias[0] b.weight[0] b.weight[1] c.weight[1]",
            "b.weight[0]": "8x1: b.bias[0] b.weight[0] c.weight[1]",
        },
        ("forward:6", "forward:7"),
    ),
    Motif(
        "squeeze_excite",
        SqueezeExcite,
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] down.weight[1] up.bias[0] up.weight[0]",
            "down.weight[0]": "4x1: down.bias[0] down.weight[0] up.weight[1]",
        },
    ),
    Motif(
        "layer_scale", LayerScale, (4, 6), {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] gamma[0]"}
    ),
    Motif(
        "prelu",
        net(lambda s, x: s.b(s.p(s.a(x))), **AB, p=lambda: nn.PReLU(8)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] p.weight[0]"},
    ),
    Motif(
        "layer_norm",
        net(
            lambda s, x: s.b(s.n(s.a(x))),
            a=lambda: nn.Linear(5, 8),
            n=lambda: nn.LayerNorm(8),
            b=lambda: nn.Linear(8, 3),
        ),
        SEQUENCE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.weight[0]"},
    ),
    Motif(
        "group_norm",
        net(
            lambda s, x: s.b(s.n(s.a(x))),
            a=lambda: conv(3, 16),
            n=lambda: nn.GroupNorm(4, 16),
            b=lambda: conv(16, 4),
        ),
        IMAGE,
        {
            "a.weight[0] rows": "4x1: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.weight[0]",
            "a.weight[0] columns": "4x4: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.weight[0]",
        },
        ("num_groups",),
    ),
    Motif(
        "instance_norm",
        net(
            lambda s, x: s.b(s.n(s.a(x))),
            **AB,
            n=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        ),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] n.bias[0] n.running_mean[0] n.running_var[0] n.weight[0]",
        },
    ),
    Motif(
        "channel_shuffle",
        net(lambda s, x: s.b(shuffled(s.a(x), 2)), **AB),
        IMAGE,
        {
            "a.weight[0] columns": "4x1: a.bias[0] a.weight[0] b.weight[1]",
            "a.weight[0] rows": "2x1: a.bias[0] a.weight[0] b.weight[1]",
        },
    ),
    Motif(
        "pixel_shuffle",
        net(lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2)), a=lambda: conv(3, 16), b=lambda: conv(4, 4)),
        IMAGE,
        {"a.weight[0]": "4x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "pixel_unshuffle",
        net(lambda s, x: s.b(F.pixel_unshuffle(s.a(x), 2)), a=lambda: conv(3, 8), b=lambda: conv(32, 4)),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "one_output_not_depthwise",
        net(
            lambda s, x: s.b((y := s.a(x)) * s.m(y).sigmoid()),
            a=lambda: conv(3, 8),
            m=lambda: conv(8, 1, 3),
            b=lambda: conv(8, 4),
        ),
        IMAGE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1] m.weight[1]"},
    ),
    Motif(
        "write_through_view",
        WriteThroughView,
        IMAGE,
        {"a.weight[0]": "4x2: a.bias[0] a.weight[0] b.weight[1] c.bias[0] c.weight[0]"},
        ("part",),
    ),
    Motif(
        "conv1d",
        net(lambda s, x: s.b(s.a(x).relu()), a=lambda: nn.Conv1d(7, 8, 3), b=lambda: nn.Conv1d(8, 4, 1)),
        SEQUENCE,
        {"a.weight[0]": "8x1: a.bias[0] a.weight[0] b.weight[1]"},
    ),
    Motif(
        "weight_norm",
        net(
            lambda s, x: s.b(s.a(x).relu()),
            a=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)),
            b=lambda: nn.Linear(8, 3),
        ),
        SEQUENCE,
        {
            "a.parametrizations.weight.original1[0]": "8x1: a.bias[0] a.parametrizations.weight.original0[0] "
            "a.parametrizations.weight.original1[0] b.weight[1]",
        },
    ),
    *[
        Motif(
            f"fused_qkv_{order}",
            lambda order=order: FusedQKV(order),
            SEQUENCE,
            {
                "embed.weight[0]": "16x1: embed.bias[0] embed.weight[0] out.weight[1] proj.bias[0] proj.weight[0] qkv.weight[1]",
                "qkv.weight[0] rows": "4x1: proj.weight[1] qkv.bias[0] qkv.weight[0]",
                "qkv.weight[0] columns": "6x8: proj.weight[1] qkv.bias[0] qkv.weight[0]",
            },
            ("num_heads", "head_dim"),
        )
        for order in ("3hd", "h3d", "chunk")
    ],
    Motif(
        "standardised_weights",
        net(
            lambda s, x: s.b(s.w(s.a(x)).relu()),
            a=lambda: conv(3, 8),
            w=lambda: StandardisedConv(8, 6, 3),
            b=lambda: conv(6, 4),
        ),
        IMAGE,
        {
            "a.weight[0]": "8x1: a.bias[0] a.weight[0] w.weight[1]",
            "w.weight[0]": "6x1: b.weight[1] w.bias[0] w.weight[0]",
        },
    ),
    Motif(
        "lstm",
        lambda: Recurrent(nn.LSTM),
        SEQUENCE,
        {
            "embed.weight[0]": "6x1: embed.bias[0] embed.weight[0] rnn.weight_ih_l0[1]",
            "rnn.weight_ih_l0[0]": "8x1: out.weight[1] rnn.bias_hh_l0[0] rnn.bias_ih_l0[0] rnn.weight_hh_l0[0] "
            "rnn.weight_hh_l0[1] rnn.weight_ih_l0[0]",
        },
    ),
    Motif(
        "lstm_bidirectional",
        lambda: Recurrent(nn.LSTM, bidirectional=True),
        SEQUENCE,
        {
            "embed.weight[0]": "6x1: embed.bias[0] embed.weight[0] rnn.weight_ih_l0[1] rnn.weight_ih_l0_reverse[1]",
            "rnn.weight_ih_l0[0]": "8x1: out.weight[1] rnn.bias_hh_l0[0] rnn.bias_hh_l0_reverse[0] rnn.bias_ih_l0[0] "
            "rnn.bias_ih_l0_reverse[0] rnn.weight_hh_l0[0] rnn.weight_hh_l0[1] rnn.weight_hh_l0_reverse[0] "
            "rnn.weight_hh_l0_reverse[1] rnn.weight_ih_l0[0] rnn.weight_ih_l0_reverse[0]",
        },
    ),
    Motif(
        "lstm_projected",
        lambda: Recurrent(nn.LSTM, proj_size=4),
        SEQUENCE,
        {
            "embed.weight[0]": "6x1: embed.bias[0] embed.weight[0] rnn.weight_ih_l0[1]",
            "rnn.weight_ih_l0[0]": "8x1: rnn.bias_hh_l0[0] rnn.bias_ih_l0[0] rnn.weight_hh_l0[0] rnn.weight_hr_l0[1] "
            "rnn.weight_ih_l0[0]",
            "rnn.weight_hh_l0[1]": "4x1: out.weight[1] rnn.weight_hh_l0[1] rnn.weight_hr_l0[0]",
        },
    ),
    Motif(
        "gru_stacked",
        lambda: Recurrent(nn.GRU, num_layers=2),
        SEQUENCE,
        {
            "embed.weight[0]": "6x1: embed.bias[0] embed.weight[0] rnn.weight_ih_l0[1]",
            "rnn.weight_ih_l0[0]": "8x1: out.weight[1] rnn.bias_hh_l0[0] rnn.bias_hh_l1[0] rnn.bias_ih_l0[0] rnn.bias_ih_l1[0] "
            "rnn.weight_hh_l0[0] rnn.weight_hh_l0[1] rnn.weight_hh_l1[0] rnn.weight_hh_l1[1] rnn.weight_ih_l0[0] "
            "rnn.weight_ih_l1[0] rnn.weight_ih_l1[1]",
        },
    ),
    Motif(
        "loop_over_depth",
        Loop,
        (4, 5),
        {
            "first.weight[0]": "8x1: "
            + " ".join(
                sorted(
                    ["first.bias[0]", "first.weight[0]", "last.weight[1]"]
                    + [f"layers.{i}.{s}" for i in range(8) for s in ("bias[0]", "weight[0]", "weight[1]")]
                )
            )
        },
    ),
    Motif(
        "convolution_over_heads",  # each head by itself along the tokens: each may lose dims of its own
        net(
            lambda s, x: s.o((s.heads(s.v(x)).sigmoid() + s.c(s.heads(s.v(x)))).transpose(1, 2).flatten(2)),
            v=lambda: nn.Linear(5, 24),
            heads=lambda: Heads(3),
            c=lambda: nn.Conv2d(3, 3, (3, 1), padding=(1, 0), groups=3, bias=False),
            o=lambda: nn.Linear(24, 4),
        ),
        SEQUENCE,
        {
            "v.weight[0] rows": "3x1: c.weight[0] o.weight[1] v.bias[0] v.weight[0]",
            "v.weight[0] columns": "8x3: o.weight[1] v.bias[0] v.weight[0]",
        },
    ),
    Motif(
        "heads_in_a_row",  # of two layers: all keep as many dims, and each layer loses heads of its own
        net(
            lambda s, x: s.o(
                torch.cat([s.two(s.a(x)), s.three(s.b(x)).relu()], 1).transpose(1, 2).flatten(2)
            ),
            a=lambda: nn.Linear(5, 16),
            b=lambda: nn.Linear(5, 24),
            two=lambda: Heads(2),
            three=lambda: Heads(3),
            o=lambda: nn.Linear(40, 4),
        ),
        SEQUENCE,
        {
            "a.weight[0] rows": "2x1: a.bias[0] a.weight[0] o.weight[1]",
            "a.weight[0] columns": "8x5: a.bias[0] a.weight[0] b.bias[0] b.weight[0] o.weight[1]",
            "b.weight[0] rows": "3x1: b.bias[0] b.weight[0] o.weight[1]",
        },
    ),
    Motif(
        "separate_qkv",
        SeparateQKV,
        SEQUENCE,
        {
            "q.weight[0] rows": "4x1: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
            "q.weight[0] columns": "6x8: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
        },
        ("num_heads", "head_dim"),
    ),
    Motif(
        "grouped_queries",
        GroupedQueries,
        SEQUENCE,
        {
            "q.weight[0] rows": "3x1: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
            "q.weight[0] middle": "2x3: o.weight[1] q.bias[0] q.weight[0]",
            "q.weight[0] columns": "4x6: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
        },
        (),
    ),
    Motif(
        "repeated_keys",
        RepeatedKeys,
        SEQUENCE,
        {
            "q.weight[0] rows": "4x1: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
            "q.weight[0] middle": "2x1: o.weight[1] q.bias[0] q.weight[0]",
            "q.weight[0] columns": "4x8: k.bias[0] k.weight[0] o.weight[1] q.bias[0] q.weight[0] v.bias[0] v.weight[0]",
        },
        ("heads", "served"),
    ),
    Motif(
        "multihead_attention",
        MultiHead,
        SEQUENCE,
        {
            "embed.weight[0]": "16x1: attention.in_proj_weight[1] attention.out_proj.bias[0] attention.out_proj.weight[0] "
            "embed.bias[0] embed.weight[0] out.weight[1]",
            "attention.in_proj_weight[0] rows": "4x1: attention.in_proj_bias[0] attention.in_proj_weight[0] "
            "attention.out_proj.weight[1]",
            "attention.in_proj_weight[0] columns": "4x8: attention.in_proj_bias[0] attention.in_proj_weight[0] "
            "attention.out_proj.weight[1]",
        },
        ("num_heads",),
    ),
    Motif(
        "multihead_attention_kdim",
        lambda: MultiHead(kdim=12, vdim=12),
        SEQUENCE,
        {
            "embed.weight[0]": "16x1: attention.out_proj.bias[0] attention.out_proj.weight[0] attention.q_proj_weight[1] "
            "embed.bias[0] embed.weight[0] out.weight[1]",
            "key.weight[0]": "12x1: attention.k_proj_weight[1] attention.v_proj_weight[1] key.bias[0] key.weight[0]",
            "attention.in_proj_bias[0] rows": "4x1: attention.in_proj_bias[0] attention.k_proj_weight[0] "
            "attention.out_proj.weight[1] attention.q_proj_weight[0] attention.v_proj_weight[0]",
            "attention.in_proj_bias[0] columns": "4x8: attention.in_proj_bias[0] attention.k_proj_weight[0] "
            "attention.out_proj.weight[1] attention.q_proj_weight[0] attention.v_proj_weight[0]",
        },
        ("num_heads",),
    ),
]
