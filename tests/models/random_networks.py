"""Small random networks: blocks wired at random into one module, whose forward interprets the drawn program.

A block is a function from a `Pick` (choices out of one drawn number) and its operands, as example tensors, to
a layer: a module, or a plain function that the network's own forward calls. All sizes follow from the
operands, so whatever is drawn runs. A value is an image [N, C, H, W], a sequence [N, L, D] or flat [N, D];
where a block needs a kind that is not there, a block that converts is put before it. To add a block: one
function with `@block`, or one call of `ways`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from motifs import FrozenBatchNorm, Net, StandardisedConv, conv, shuffled
from torch import Tensor, nn

IMAGE, SEQUENCE, FLAT = (4,), (3,), (2,)  # kinds of values by their number of dims
ANY = IMAGE + SEQUENCE + FLAT
LIKE = (0,)  # a further operand of the first one's kind and size, whatever its width
WIDTHS = (4, 8, 6, 12, 3, 8, 2, 6, 4, 1)  # awkward ones, and more often some of which a part can leave
LARGEST = 1 << 11  # entries of a value, per sample

Layer = Callable[..., Any]


class Skip(Exception):
    """A block that makes no sense for its operands: it is left out."""


class Pick:
    """Choices out of one drawn number; 0 takes the first of every list."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, options: Sequence[Any]) -> Any:
        self.number, place = divmod(self.number, len(options))
        return options[place]


@dataclasses.dataclass(frozen=True)
class Block:
    """`make(pick, *operands)` gives a layer; `operands` are their kinds; `writes`: to the first one, in
    place.
    """

    make: Callable[..., Layer]
    operands: tuple[tuple[int, ...], ...]
    writes: bool = False


BLOCKS: dict[str, Block] = {}


def block(
    *operands: tuple[int, ...], writes: bool = False
) -> Callable[[Callable[..., Layer]], Callable[..., Layer]]:
    """Register a block by the kinds of its operands."""

    def register(make: Callable[..., Layer]) -> Callable[..., Layer]:
        BLOCKS[make.__name__] = Block(make, operands, writes)
        return make

    return register


def ways(name: str, operands: Sequence[tuple[int, ...]], *functions: Layer, along: bool = False) -> None:
    """Register a block that is one of several functions, as a module of its own or in the network's forward.

    Args:
        along: the functions take the dim of the channels, before the operands.
    """

    def make(pick: Pick, *given: Tensor) -> Layer:
        run = pick(functions)
        run = functools.partial(run, axis(given[0])) if along else run
        return run if len(operands) > 1 or pick((True, False)) else Net(lambda s, x: run(x))

    BLOCKS[name] = Block(make, tuple(operands))


class Pair(Net):
    """A `Net` of two operands."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(self, x, y)


# -- what blocks are made of ---------------------------------------------------------------------------------


def axis(x: Tensor) -> int:
    return 2 if x.dim() == 3 else 1


def width(x: Tensor) -> int:
    return int(x.shape[axis(x)])


def around(x: Tensor) -> tuple[int, ...]:
    """The shape of a value but for its channels."""
    return tuple(n for d, n in enumerate(x.shape) if d != axis(x))


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0] or [1]


def dense(x: Tensor, out: int, **kw: Any) -> nn.Module:
    """A linear layer over the channels of any kind of value."""
    return nn.Conv2d(width(x), out, 1, **kw) if x.dim() == 4 else nn.Linear(width(x), out, **kw)


def fitted(x: Tensor, out: int) -> nn.Module:
    """Brings x to a width, if it has another one."""
    return nn.Identity() if width(x) == out else dense(x, out)


def vector(x: Tensor) -> Tensor:
    """One number per channel, shaped so that it broadcasts to x."""
    return torch.randn((width(x), 1, 1) if x.dim() == 4 else (width(x),))


def zeros_around(x: Tensor) -> tuple[int, ...]:
    """What `F.pad` adds to the dims after the channels."""
    return (0, 0) * (x.dim() - 1 - axis(x))


def cut(x: Tensor, dim: int, start: int | None, end: int | None, step: int | None = None) -> Tensor:
    return x[..., start:end:step] if dim == 2 else x[:, start:end:step]


def require(condition: bool) -> None:
    if not condition:
        raise Skip


def sized(pick: Pick, run: Callable[..., Any], *sizes: int) -> Layer:
    """`run(x, *sizes)` with its sizes as literals of a module, attributes of it, or literals of the whole
    network's forward.
    """
    home = pick(("module", "attribute", "network"))
    if home == "attribute":
        return Net(lambda s, x: run(x, *s.sizes), sizes=sizes)
    return Net(lambda s, x: run(x, *sizes)) if home == "module" else lambda x: run(x, *sizes)


# -- any kind ------------------------------------------------------------------------------------------------


@block(ANY)
def project(pick: Pick, x: Tensor) -> Layer:
    return dense(x, pick(WIDTHS), bias=pick((True, False)))


@block(ANY)
def head(pick: Pick, x: Tensor) -> Layer:
    run = {4: lambda x: x.mean((2, 3)), 3: lambda x: x.mean(1), 2: lambda x: x}[x.dim()]
    return Net(lambda s, x: s.out(run(x)), out=nn.Linear(width(x), 2))


ways(
    "activation", [ANY],
    F.relu, F.gelu, F.silu, F.hardswish, torch.tanh, torch.sigmoid, F.softplus, F.elu, torch.abs, F.leaky_relu,
)  # fmt: skip


@block(ANY)
def prelu(pick: Pick, x: Tensor) -> Layer:
    act = nn.PReLU(width(x))  # its channels are dim 1
    return act if x.dim() != 3 else Net(lambda s, x: s.act(x.transpose(1, 2)).transpose(1, 2), act=act)


@block(ANY, LIKE)
def merge(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    """Residuals and gates; a layer fits the second operand only where it must."""
    run = pick((
        torch.add, torch.mul, torch.sub, torch.maximum, lambda a, b: torch.where(a > 0, a, b), lambda a, b: a * b.sigmoid(),
        lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a + 0.5 * b,
    ))  # fmt: skip
    return run if width(x) == width(y) else Pair(lambda s, a, b: run(a, s.fit(b)), fit=fitted(y, width(x)))


ways(
    "cat", [ANY, LIKE],
    lambda d, a, b: torch.cat([a, b], d), lambda d, a, b: torch.cat([b, b, a], d), lambda d, a, b: torch.cat((b.relu(), a), d),
    along=True,
)  # fmt: skip
ways("cat_three", [ANY, LIKE, LIKE], lambda d, a, b, c: torch.cat([a, b, c], d), along=True)
ways("cat_twice", [ANY], lambda d, x: torch.cat([x, x], d), lambda d, x: torch.cat([x, -x], d), along=True)


@block(ANY)
def repeat(pick: Pick, x: Tensor) -> Layer:
    times = [2 if d == axis(x) else 1 for d in range(x.dim())]
    return lambda x: x.repeat(times)


@block(ANY)
def split(pick: Pick, x: Tensor) -> Layer:
    require(width(x) > 1)
    dim, first = axis(x), pick(range(1, width(x)))
    return sized(pick, lambda x, *sizes: x.split(list(sizes), dim), first, width(x) - first)


@block(ANY)
def chunk(pick: Pick, x: Tensor) -> Layer:
    require(width(x) > 1)
    dim, parts = axis(x), pick(divisors(width(x))[:2])
    return Net(lambda s, x: x.chunk(parts, dim))


@block(ANY)
def glu(pick: Pick, x: Tensor) -> Layer:
    dim = axis(x)

    def gated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        return a * F.gelu(b)

    def halves(x: Tensor) -> Tensor:
        half = x.shape[dim] // 2
        return x.narrow(dim, 0, half) * x.narrow(dim, half, half).sigmoid()

    run = pick((lambda x: F.glu(x, dim), gated, halves))
    if width(x) % 2 == 0 and pick((True, False)):
        return Net(lambda s, x: run(x))
    return Net(lambda s, x: run(s.up(x)), up=dense(x, 2 * pick(WIDTHS)))


@block(ANY)
def part(pick: Pick, x: Tensor) -> Layer:
    """A slice of channels."""
    require(width(x) > 1)
    dim = axis(x)
    run = pick((
        lambda x, n: cut(x, dim, None, n), lambda x, n: cut(x, dim, n, None), lambda x, n: cut(x, dim, None, -n),
        lambda x, n: cut(x, dim, -n, None), lambda x, n: x.narrow(dim, 0, n),
    ))  # fmt: skip
    return sized(pick, run, pick(range(1, width(x))))


@block(ANY)
def every_second(pick: Pick, x: Tensor) -> Layer:
    require(width(x) > 1)
    dim, start = axis(x), pick((0, 1))
    return lambda x: cut(x, dim, start, None, 2)


@block(ANY)
def pad_channels(pick: Pick, x: Tensor) -> Layer:
    rest = zeros_around(x)
    return sized(
        pick,
        lambda x, before, after: F.pad(x, (*rest, before, after)),
        *pick(((0, 2), (1, 1), (2, 0), (0, 4))),
    )


@block(ANY, LIKE)
def padded_shortcut(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    """The narrower operand is padded with zero channels to the width of the other."""
    rest, missing = zeros_around(x), width(x) - width(y)
    require(missing > 0)
    before = pick((0, missing, missing // 2))
    return Pair(lambda s, a, b: a + F.pad(b, (*rest, before, missing - before)))


@block(ANY)
def weight_norm(pick: Pick, x: Tensor) -> Layer:
    return nn.utils.parametrizations.weight_norm(dense(x, pick(WIDTHS)), dim=pick((0, 0, 1)))


@block(ANY)
def scale(pick: Pick, x: Tensor) -> Layer:
    """A vector over channels, kept as a parameter, a buffer or a plain tensor."""
    kind = pick((nn.Parameter, nn.Buffer, lambda t: t))
    run = pick(
        (lambda x, g: x * g, lambda x, g: x + g, lambda x, g: x * (1 + g) - g, lambda x, g: x / (g.abs() + 1))
    )
    return Net(lambda s, x: run(x, s.gamma), gamma=kind(vector(x)))


ways(  # what is computed over all channels: over those that are left, in the small model
    "normalise", [ANY],
    lambda d, x: x.softmax(d), lambda d, x: F.normalize(x, dim=d), lambda d, x: x - x.mean(d, keepdim=True),
    lambda d, x: x - x.amax(d, keepdim=True), lambda d, x: x * x.max(d, keepdim=True).values,
    lambda d, x: x / (1 + x.pow(2).sum(d, keepdim=True)), lambda d, x: x.log_softmax(d),
    lambda d, x: (x - x.mean(d, keepdim=True)) / (x.var(d, keepdim=True, unbiased=False) + 1e-3).sqrt(),
    lambda d, x: x * x.norm(dim=d, keepdim=True), lambda d, x: x - torch.logsumexp(x, d, keepdim=True),
    along=True,
)  # fmt: skip


@block(ANY)
def rms_norm(pick: Pick, x: Tensor) -> Layer:
    dim, gamma = axis(x), nn.Parameter(vector(x))
    return Net(lambda s, x: x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-3) * s.gamma, gamma=gamma)


@block(ANY, LIKE)
def stack(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    def unbound(t: Tensor) -> Tensor:
        a, b = t.unbind(1)
        return a * b.sigmoid()

    run = pick(
        (
            lambda t: t.sum(1),
            unbound,
            lambda t: t.amax(1),
            lambda t: (t.softmax(1) * t).sum(1),
            lambda t: t[:, 0] - t[:, 1],
        )
    )
    return Pair(lambda s, a, b: run(torch.stack([a, s.fit(b)], 1)), fit=fitted(y, width(x)))


@block(ANY)
def einsum(pick: Pick, x: Tensor) -> Layer:
    spec = {4: "nchw,cd->ndhw", 3: "nlc,cd->nld", 2: "nc,cd->nd"}[x.dim()]
    return Net(
        lambda s, x: torch.einsum(spec, x, s.weight), weight=nn.Parameter(torch.randn(width(x), pick(WIDTHS)))
    )


@block(ANY)
def bottleneck(pick: Pick, x: Tensor) -> Layer:
    down = dense(x, pick(WIDTHS))
    run = pick((lambda a, b: a + b, lambda a, b: a * b.sigmoid()))
    return Net(lambda s, x: run(x, s.up(F.relu(s.down(x)))), down=down, up=dense(down(x), width(x)))


@block(ANY, writes=True)
def inplace(pick: Pick, x: Tensor) -> Layer:
    def first(x: Tensor) -> Tensor:
        x[:, :1] *= 2
        return x

    def added(x: Tensor) -> Tensor:
        x += 1
        return x

    run = pick(
        (
            F.relu_,
            first,
            added,
            lambda x: x.masked_fill_(x > 1, 1.0),
            lambda x: x.mul_(0.5),
            nn.Hardswish(inplace=True),
        )
    )
    return run if pick((True, False)) else Net(lambda s, x: run(x))


@block(ANY, LIKE, writes=True)
def inplace_add(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    def run(s: Any, a: Tensor, b: Tensor) -> Tensor:
        a += s.fit(b)
        return a

    return Pair(run, fit=fitted(y, width(x)))


@block(ANY, LIKE, writes=True)
def write(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    """Writes channels of the second operand over those of the first."""
    dim = axis(x)

    def run(s: Any, a: Tensor, b: Tensor) -> Tensor:
        cut(a, dim, None, s.count)[:] = cut(b, dim, None, s.count)
        return a

    return Pair(run, count=min(width(x), width(y)))


@block(ANY)
def again(pick: Pick, x: Tensor) -> Layer:
    """An earlier layer once more: the wiring knows which."""
    raise Skip


@block(ANY)
def tied(pick: Pick, x: Tensor) -> Layer:
    """A layer with the weight of an earlier one: the wiring knows which."""
    raise Skip


# -- images --------------------------------------------------------------------------------------------------


@block(IMAGE)
def convolution(pick: Pick, x: Tensor) -> Layer:
    k, d = pick((3, 1)), pick((1, 2))
    return nn.Conv2d(width(x), pick(WIDTHS), k, pick((1, 2)), d * (k // 2), d, bias=pick((True, False)))


@block(IMAGE)
def depthwise(pick: Pick, x: Tensor) -> Layer:
    return conv(width(x), width(x) * pick((1, 2, 3)), 3, groups=width(x), bias=pick((True, False)))


@block(IMAGE)
def grouped(pick: Pick, x: Tensor) -> Layer:
    g = pick(divisors(width(x)))
    return conv(width(x), g * pick((1, 2, 3)), 3, groups=g, bias=pick((True, False)))


@block(IMAGE)
def transposed(pick: Pick, x: Tensor) -> Layer:
    g = pick((1, *divisors(width(x))))
    size = pick(({"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "padding": 1}))
    return nn.ConvTranspose2d(width(x), g * pick((1, 2, 3, 4)), groups=g, bias=pick((True, False)), **size)


@block(IMAGE)
def standardised(pick: Pick, x: Tensor) -> Layer:
    return StandardisedConv(width(x), pick(WIDTHS), 3)


@block(IMAGE)
def image_norm(pick: Pick, x: Tensor) -> Layer:
    require(x.shape[2] * x.shape[3] > 1)
    return pick((
        nn.BatchNorm2d, FrozenBatchNorm, lambda c: nn.GroupNorm(pick((1, *divisors(c))), c),
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=pick((False, True))),
        lambda c: Net(lambda s, x: s.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(c)),
        lambda c: Net(lambda s, x: s.n(x.movedim(1, -1)).movedim(-1, 1), n=nn.RMSNorm(c)),
        lambda c: nn.GroupNorm(pick(divisors(c)), c, affine=False),
    ))(width(x))  # fmt: skip


ways(
    "resample", [IMAGE],
    lambda x: F.max_pool2d(x, 2, ceil_mode=True), lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.interpolate(x, scale_factor=2),
    lambda x: F.interpolate(x, size=(5, 4), mode="bilinear"), lambda x: F.adaptive_avg_pool2d(x, 2), lambda x: x[:, :, ::2, ::2],
    lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), lambda x: x.transpose(2, 3),
    lambda x: F.adaptive_max_pool2d(x, (2, 3)), lambda x: x.flip(3), lambda x: F.pad(x, (0, 1, 0, 1)),
)  # fmt: skip


@block(IMAGE)
def squeeze_excite(pick: Pick, x: Tensor) -> Layer:
    c, w = width(x), pick(WIDTHS)
    if pick((True, False)):
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(c, w), nn.ReLU(), conv(w, c), nn.Sigmoid())
        return Net(lambda s, x: x * s.gate(x), gate=gate)
    view = pick(
        (
            lambda t: t[:, :, None, None],
            lambda t: t.view(t.shape[0], t.shape[1], 1, 1),
            lambda t: t.view(-1, c, 1, 1),
        )
    )
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, w), nn.ReLU(), nn.Linear(w, c), nn.Sigmoid()
    )
    return Net(lambda s, x: x * view(s.gate(x)), gate=gate)


@block(IMAGE)
def spatial_gate(pick: Pick, x: Tensor) -> Layer:
    """(N, 1, H, W) times (N, C, H, W)."""
    if pick((True, False)):
        return Net(lambda s, x: x * s.gate(x).sigmoid(), gate=conv(width(x), 1, pick((1, 3))))
    return Net(
        lambda s, x: x * s.gate(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
        gate=conv(2, 1, 3),
    )


@block(IMAGE, FLAT)
def channel_gate(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    """A flat value drives the channels of an image: a gate, or scale and shift."""
    if pick((True, False)):
        return Pair(lambda s, a, b: a * s.fit(b)[:, :, None, None].sigmoid(), fit=fitted(y, width(x)))

    def film(s: Any, a: Tensor, b: Tensor) -> Tensor:
        gamma, beta = s.up(b)[..., None, None].chunk(2, 1)
        return a * (1 + gamma) + beta

    return Pair(film, up=nn.Linear(width(y), 2 * width(x)))


@block(IMAGE)
def shuffle(pick: Pick, x: Tensor) -> Layer:
    g = pick(divisors(width(x)))
    home = pick(("attribute", "layer", "literal"))
    if home == "attribute":
        return Net(lambda s, x: shuffled(x, s.groups), groups=g)
    return nn.ChannelShuffle(g) if home == "layer" else Net(lambda s, x: shuffled(x, g))


@block(IMAGE)
def pixel_shuffle(pick: Pick, x: Tensor) -> Layer:
    if width(x) % 4 == 0 and pick((True, False)):
        return nn.PixelShuffle(2)
    return nn.Sequential(conv(width(x), 4 * pick(WIDTHS)), nn.PixelShuffle(2))


@block(IMAGE)
def pixel_unshuffle(pick: Pick, x: Tensor) -> Layer:
    require(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0)
    return nn.PixelUnshuffle(2)


@block(IMAGE)
def patches(pick: Pick, x: Tensor) -> Layer:
    """Patches of 2 x 2 moved to the channels, as patch merging does."""
    require(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0)

    def merging(s: Any, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return s.out(x).permute(0, 3, 1, 2)

    return Net(merging, out=nn.Sequential(nn.LayerNorm(4 * width(x)), nn.Linear(4 * width(x), pick(WIDTHS))))


@block(IMAGE)
def channels_last(pick: Pick, x: Tensor) -> Layer:
    """A perceptron over channels, with layer scale, as in ConvNeXt."""
    c, w = width(x), pick(WIDTHS)
    mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, w), nn.GELU(), nn.Linear(w, c))
    gamma = nn.Parameter(torch.randn(c))
    return Net(
        lambda s, x: x + (s.mlp(x.permute(0, 2, 3, 1)) * s.gamma).permute(0, 3, 1, 2), mlp=mlp, gamma=gamma
    )


@block(IMAGE)
def coordinates(pick: Pick, x: Tensor) -> Layer:
    def run(s: Any, x: Tensor) -> Tensor:
        row = torch.linspace(-1, 1, x.shape[3]).to(x.dtype)
        return torch.cat([x, row.expand(x.shape[0], 1, x.shape[2], x.shape[3])], 1)

    return Net(run)


ways("upcat", [IMAGE, IMAGE], lambda a, b: torch.cat([a, F.interpolate(b, size=a.shape[2:])], 1))
ways(
    "image_mean", [IMAGE],
    lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax((2, 3)),
    lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), lambda x: x.flatten(2).mean(-1),
)  # fmt: skip
ways(
    "tokens", [IMAGE],
    lambda x: x.flatten(2).transpose(1, 2), lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
    lambda x: x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1), lambda x: x.mean(2).transpose(1, 2),
)  # fmt: skip


@block(IMAGE)
def flatten(pick: Pick, x: Tensor) -> Layer:
    size = x[0].numel()
    run = pick((
        lambda x: x.flatten(1), lambda x: x.permute(0, 2, 3, 1).flatten(1), lambda x: x.reshape(-1, size),
        lambda x: x.contiguous().view(-1, size), lambda x: x.contiguous().view(x.size(0), -1),
        lambda x: x.transpose(1, 2).flatten(1),
    ))  # fmt: skip
    if size <= 48 and pick((False, True)):
        return Net(lambda s, x: run(x))
    return Net(lambda s, x: s.out(run(x)), out=nn.Linear(size, pick(WIDTHS)))


@block(IMAGE)
def windows(pick: Pick, x: Tensor) -> Layer:
    """Attention in shifted windows of 2 x 2."""
    require(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0)
    shift = pick((1, 0))

    def run(s: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = torch.roll(x, (-shift, -shift), (2, 3)).reshape(n, c, h // 2, 2, w // 2, 2)
        x = s.attention(x.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c))
        x = x.reshape(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return torch.roll(x, (shift, shift), (2, 3))

    return Net(run, attention=Attention(pick, width(x), 4))


@block(IMAGE)
def non_local(pick: Pick, x: Tensor) -> Layer:
    c, w = width(x), pick(WIDTHS)

    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.q(x).flatten(2), s.k(x).flatten(2), s.v(x).flatten(2)
        y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return x + s.out(y.view(x.shape[0], -1, *x.shape[2:]))

    return Net(run, q=conv(c, w), k=conv(c, w), v=conv(c, w + 1), out=conv(w + 1, c))


# -- sequences -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention in one of many ways: how q, k and v are made, what happens to them, and which kernel."""

    def __init__(self, pick: Pick, width: int, length: int) -> None:
        super().__init__()
        self.layout, self.kernel = (
            pick(("3hd", "h3d", "chunk", "separate", "split")),
            pick(("matmul", "sdpa", "einsum")),
        )
        self.extra = pick(("none", "rotary", "norm", "bias", "causal"))
        self.num_heads, self.head_dim, share = pick((2, 4, 3, 1)), pick((4, 2, 6, 3)), pick((1, 2))
        grouped = self.layout in ("separate", "split") and self.num_heads % share == 0
        self.kv_heads = self.num_heads // share if grouped else self.num_heads
        inner, other = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        if self.layout == "separate":
            self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, other), nn.Linear(width, other)
        else:
            self.qkv = nn.Linear(width, inner + 2 * other)
        self.sizes = [inner, other, other]
        self.out = nn.Linear(inner, width)
        self.rotary = self.extra == "rotary" and self.head_dim % 2 == 0
        if self.rotary:
            self.register_buffer("cos", torch.randn(length, self.head_dim // 2))
            self.register_buffer("sin", torch.randn(length, self.head_dim // 2))
        if self.extra == "norm":
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        if self.extra == "bias":
            self.table = nn.Parameter(torch.randn(2 * length - 1, self.num_heads))
            place = torch.arange(length)
            self.register_buffer("index", place[:, None] - place[None] + length - 1)

    def made(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        if self.layout == "3hd":
            return (
                self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            )
        if self.layout == "h3d":
            return self.qkv(x).view(b, n, self.num_heads, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
        if self.layout == "separate":
            parts: Any = self.q(x), self.k(x), self.v(x)
        else:
            parts = self.qkv(x).chunk(3, -1) if self.layout == "chunk" else self.qkv(x).split(self.sizes, -1)
        q = parts[0].view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (t.view(b, n, self.kv_heads, self.head_dim).transpose(1, 2) for t in parts[1:])
        return q, k, v

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)

    def repeated(self, x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        times = self.num_heads // self.kv_heads
        return x[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.made(x)
        if self.extra == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        if self.kv_heads != self.num_heads:
            k, v = self.repeated(k), self.repeated(v)
        bias = self.table[self.index].permute(2, 0, 1)[None] if self.extra == "bias" else None
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.extra == "causal")
        else:
            plain = self.kernel == "matmul"
            weights = (
                q @ k.transpose(-2, -1) if plain else torch.einsum("bhnd,bhmd->bhnm", q, k)
            ) * self.head_dim**-0.5
            weights = (weights if bias is None else weights + bias).softmax(-1)
            y = weights @ v if plain else torch.einsum("bhnm,bhmd->bhnd", weights, v)
        return x + self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


@block(SEQUENCE)
def attention(pick: Pick, x: Tensor) -> Layer:
    return Attention(pick, width(x), x.shape[1])


@block(SEQUENCE, SEQUENCE)
def cross_attention(pick: Pick, x: Tensor, y: Tensor) -> Layer:
    heads, kw = pick((1, *divisors(width(x)))), {"batch_first": True, "bias": pick((True, False))}
    weights = pick((False, True))
    layer = nn.MultiheadAttention(width(x), heads, kdim=width(y), vdim=width(y), **kw)
    return Pair(lambda s, a, b: a + s.attention(a, b, b, need_weights=weights)[0], attention=layer)


@block(SEQUENCE)
def multihead(pick: Pick, x: Tensor) -> Layer:
    layer = nn.MultiheadAttention(
        width(x), pick(divisors(width(x))), batch_first=True, bias=pick((True, False))
    )
    weights = pick((False, True))
    return Net(lambda s, x: x + s.attention(x, x, x, need_weights=weights)[0], attention=layer)


@block(SEQUENCE)
def encoder(pick: Pick, x: Tensor) -> Layer:
    kw = {"norm_first": pick((False, True)), "batch_first": True, "activation": pick(("relu", "gelu"))}
    return nn.TransformerEncoderLayer(width(x), pick(divisors(width(x))), pick(WIDTHS), **kw)


@block(SEQUENCE)
def linear_attention(pick: Pick, x: Tensor) -> Layer:
    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).chunk(3, -1)
        return s.out(q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v))

    w = pick(WIDTHS)
    return Net(run, qkv=nn.Linear(width(x), 3 * w), out=nn.Linear(w, pick(WIDTHS)))


@block(SEQUENCE)
def recurrent(pick: Pick, x: Tensor) -> Layer:
    kind, size = pick((nn.LSTM, nn.GRU, nn.RNN)), pick(WIDTHS)
    kw = {"bidirectional": pick((False, True)), "num_layers": pick((1, 2)), "batch_first": True}
    if kind is nn.LSTM and size > 2 and pick((False, True)):
        kw["proj_size"] = 2
    return Net(lambda s, x: s.rnn(x)[0], rnn=kind(width(x), size, **kw))


@block(SEQUENCE)
def sequence_norm(pick: Pick, x: Tensor) -> Layer:
    kind, affine = pick((nn.LayerNorm, nn.RMSNorm)), pick((True, True, False))
    return kind(width(x), elementwise_affine=affine)


@block(SEQUENCE)
def position(pick: Pick, x: Tensor) -> Layer:
    if pick((True, False)):
        return Net(lambda s, x: x + s.position, position=nn.Parameter(torch.randn(1, *x.shape[1:])))
    return Net(lambda s, x: x + s.table(torch.arange(x.shape[1])), table=nn.Embedding(*x.shape[1:]))


@block(SEQUENCE)
def class_token(pick: Pick, x: Tensor) -> Layer:
    token = nn.Parameter(torch.randn(1, 1, width(x)))
    return Net(lambda s, x: torch.cat([s.token.expand(x.shape[0], -1, -1), x], 1), token=token)


@block(SEQUENCE)
def mixer(pick: Pick, x: Tensor) -> Layer:
    mlp = nn.Sequential(nn.Linear(x.shape[1], w := pick(WIDTHS)), nn.GELU(), nn.Linear(w, x.shape[1]))
    return Net(lambda s, x: x + s.mlp(x.transpose(1, 2)).transpose(1, 2), mlp=mlp)


@block(SEQUENCE)
def conv1d(pick: Pick, x: Tensor) -> Layer:
    g = pick((1, *divisors(width(x))))
    return Net(
        lambda s, x: s.conv(x.mT).mT, conv=nn.Conv1d(width(x), g * pick((1, 2, 4)), 3, padding=1, groups=g)
    )


@block(SEQUENCE)
def split_heads(pick: Pick, x: Tensor) -> Layer:
    """A mean, a norm or a softmax per head."""
    run = pick((
        lambda t: t.mean(-2), lambda t: (t / (1 + t.norm(dim=-1, keepdim=True))).flatten(-2), lambda t: t.softmax(-1).flatten(2),
    ))  # fmt: skip
    view = pick((lambda x, h: x.unflatten(-1, (h, -1)), lambda x, h: x.reshape(*x.shape[:2], h, -1)))
    return sized(pick, lambda x, h: run(view(x, h)), pick(divisors(width(x))))


ways(
    "token_mean", [SEQUENCE], lambda x: x.mean(1), lambda x: x[:, 0], lambda x: x[:, -1], lambda x: x.amax(1)
)


@block(SEQUENCE)
def sequence_flatten(pick: Pick, x: Tensor) -> Layer:
    return Net(lambda s, x: s.out(x.flatten(1)), out=nn.Linear(x[0].numel(), pick(WIDTHS)))


@block(SEQUENCE)
def grid(pick: Pick, x: Tensor) -> Layer:
    h = max(d for d in range(1, 5) if x.shape[1] % d == 0)
    w = x.shape[1] // h
    return pick((
        lambda x: x.transpose(1, 2).unflatten(2, (h, w)), lambda x: x.mT.reshape(x.shape[0], x.shape[2], h, w),
        lambda x: x.reshape(x.shape[0], h, w, -1).permute(0, 3, 1, 2),
    ))  # fmt: skip


# -- flat values ---------------------------------------------------------------------------------------------


@block(FLAT)
def flat_norm(pick: Pick, x: Tensor) -> Layer:
    return pick((nn.BatchNorm1d, nn.LayerNorm, lambda c: nn.GroupNorm(pick((1, *divisors(c))), c)))(width(x))


@block(FLAT)
def to_sequence(pick: Pick, x: Tensor) -> Layer:
    w = pick(WIDTHS)
    run = pick(
        (
            lambda t: t.view(-1, 4, w),
            lambda t: t.unflatten(1, (4, -1)),
            lambda t: t.view(-1, w, 4).transpose(1, 2),
        )
    )
    return Net(lambda s, x: run(s.up(x)), up=nn.Linear(width(x), 4 * w))


@block(FLAT)
def to_image(pick: Pick, x: Tensor) -> Layer:
    w = pick(WIDTHS)
    run = pick((lambda t: t.view(-1, w, 2, 2), lambda t: t.reshape(t.shape[0], -1, 2, 2)))
    return Net(lambda s, x: run(s.up(x)), up=nn.Linear(width(x), 4 * w))


CONVERSIONS = {
    (IMAGE, SEQUENCE): "tokens", (IMAGE, FLAT): "image_mean", (SEQUENCE, IMAGE): "grid",
    (SEQUENCE, FLAT): "token_mean", (FLAT, SEQUENCE): "to_sequence", (FLAT, IMAGE): "to_image",
}  # fmt: skip

# whether these copy depends on sizes, so that a write before or after one of them means another thing in a
# smaller model
RESHAPES = {"tokens", "grid", "flatten", "shuffle", "split_heads", "pixel_shuffle", "pixel_unshuffle"}


# -- wiring --------------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Interprets a program: [(names of the results, name of the layer, names of the operands)]."""

    def __init__(self, outputs: str) -> None:
        super().__init__()
        self.program: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = []
        self.functions: dict[str, Layer] = {}
        self.heads: list[str] = []
        self.outputs = outputs

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values: dict[str, Any] = {"x": x, "y": y}
        for names, layer, operands in self.program:
            result = (self.functions.get(layer) or getattr(self, layer))(*[values[name] for name in operands])
            values.update(
                {names[0]: result} if len(names) == 1 else {name: result[i] for i, name in enumerate(names)}
            )
        if self.outputs == "tensor":
            return sum(values[name] for name in self.heads)
        return (
            {name: values[name] for name in self.heads}
            if self.outputs == "dict"
            else [values[name] for name in self.heads]
        )


class Wiring:
    """A network while it is wired, and what it was wired from: its repr makes it again.

    Args:
        shapes: of one or two inputs, named x and y.
        steps: (block, names of the operands, drawn number); results are named after the block and the step's
            number.
        outputs: what the network returns: a "tensor", "dict" or "list".
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        steps: Iterable[tuple[str, str, int]] = (),
        outputs: str = "tensor",
    ) -> None:
        torch.manual_seed(0)
        self.shapes, self.net = list(shapes), Wired(outputs)
        self.steps: list[tuple[str, str, int]] = []
        self.inputs = tuple(torch.randn(shape) for shape in shapes)
        self.values = {name: x.clone() for name, x in zip("xy", self.inputs, strict=False)}
        self._bases = {name: name for name in self.values}  # of each value, the one whose storage it shares
        self._fixed = set(self.values)  # bases that may not be written to
        for step in steps:
            self.add(*step)

    def add(self, name: str, operands: str, number: int) -> str:
        """Add a step; the name of its (first) result.

        Raises:
            Skip: the block does not suit its operands; nothing was added.
        """
        names = tuple(operands.split())
        given, place = [self.values[n] for n in names], f"{name}{len(self.steps)}"
        require(not BLOCKS[name].writes or self._writable(*names))
        called, layer = self._layer(name, place, number, given)
        with torch.no_grad():
            result = layer(*given)
        results = result if isinstance(result, tuple) else (result,)
        require(max(r[0].numel() for r in results) <= LARGEST)
        if isinstance(layer, nn.Module):
            setattr(self.net, called, layer)
        else:
            self.net.functions[called] = layer
        found = (place,) if len(results) == 1 else tuple(f"{place}_{i}" for i in range(len(results)))
        self.values.update(zip(found, results, strict=True))
        shared = (
            name in RESHAPES
            or results[0].untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()
        )
        self._bases.update((n, self._bases[names[0]] if shared else n) for n in found)
        if name in RESHAPES:
            self._fixed.add(self._bases[names[0]])
        self.net.program.append((found, called, names))
        self.steps.append((name, operands, number))
        return found[0]

    def _layer(self, name: str, place: str, number: int, given: list[Tensor]) -> tuple[str, Layer]:
        """The layer of a step and its name: a new one, or one that was there before."""
        if name in ("again", "tied"):
            known = [layer for layer, shape in self._layers() if shape == given[0].shape]
            require(bool(known))
            called = Pick(number)(known)
            layer = getattr(self.net, called)
            return (called, layer) if name == "again" else (place, _tied(layer))
        layer = BLOCKS[name].make(Pick(number), *given)
        if isinstance(layer, nn.Module):
            prepare(layer.eval())
        return place, layer

    def _layers(self) -> Iterator[tuple[str, torch.Size]]:
        """Modules of one operand, and its shape."""
        for _, layer, operands in self.net.program:
            if layer not in self.net.functions and len(operands) == 1:
                yield layer, self.values[operands[0]].shape

    def _writable(self, name: str, *others: str) -> bool:
        """Whether a value may be written to: no input shares its storage, none that is read beside it, and
        none that may or may not share it; and no entry of it shows up twice."""
        x, base = self.values[name], self._bases[name]
        once = all(x.stride(d) for d in range(x.dim()) if x.shape[d] > 1)
        return once and base not in self._fixed and base not in [self._bases[other] for other in others]

    def draw(self, name: str, places: int, number: int) -> None:
        """Add a step whose operands are told by a number; nothing if the block does not suit them."""
        try:
            names: list[str] = []
            for kinds in BLOCKS[name].operands:
                places, place = divmod(places, 6)
                names.append(self._find(kinds, place, self.values[names[0]] if names else None))
            self.add(name, " ".join(names), number)
        except Skip:
            return

    def _find(self, kinds: tuple[int, ...], number: int, first: Tensor | None) -> str:
        """A value of one of these kinds, the newest for 0; made out of the newest one of all if there is
        none.
        """
        if kinds == LIKE and first is not None:
            found = [
                n for n, v in self.values.items() if v.dim() == first.dim() and around(v) == around(first)
            ]
        else:
            found = [n for n, v in self.values.items() if v.dim() in kinds]
        if found:
            return found[-1 - number % len(found)]
        newest = list(self.values)[-1]
        return self.add(CONVERSIONS[(self.values[newest].dim(),), kinds], newest, number)

    def finish(self) -> Wiring:
        """Give every value that nobody reads a head."""
        read = {name for _, _, operands in self.net.program for name in operands}
        for name in [n for n in self.values if n not in read]:
            self.net.heads.append(self.add("head", name, 0))
        self.net.eval()
        return self

    def __repr__(self) -> str:
        steps = "".join(f"\n    {step}," for step in self.steps if step[0] != "head")
        return f"Wiring({self.shapes}, [{steps}\n], {self.net.outputs!r}).finish()"


def prepare(layer: nn.Module) -> None:
    """Random statistics and scales, so that no channel is like another, and so large that values neither grow
    nor vanish.
    """
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(std=1 / math.sqrt(max(1, tensor[0].numel())) if tensor.dim() else 1)


def _tied(layer: nn.Module) -> nn.Module:
    """Another layer with the same weight and a bias of its own."""
    require(
        isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(layer._parameters.get("weight"), nn.Parameter)
    )
    twin = copy.deepcopy(layer)
    twin.weight = layer.weight
    return twin
