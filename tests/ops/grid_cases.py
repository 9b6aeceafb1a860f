"""Ops on dims that are grids: a layer's 32 channels seen as a few dims, one op along one of them, another layer.

`LAYOUTS` says how the channels are seen, `OPS` what is done along a dim. Every pair makes a network whose cuts
must be proved, whatever the op does along the dim: what stays of each value is rectangular, and what an op mixes
is tied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Along = Callable[[Tensor, int], Tensor]


class Layout(nn.Module):
    """[B, 32] seen as several dims."""

    def forward(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Heads(Layout):
    def forward(self, y: Tensor) -> Tensor:
        return y.unflatten(1, (4, 8))


class Nested(Layout):
    """A grid of grids."""

    def forward(self, y: Tensor) -> Tensor:
        return y.view(-1, 2, 4, 4)


class Turned(Layout):
    def forward(self, y: Tensor) -> Tensor:
        return y.view(-1, 4, 8).transpose(1, 2)


class MiddleOutside(Layout):
    def forward(self, y: Tensor) -> Tensor:
        return y.view(-1, 2, 4, 4).transpose(1, 2)


class InnerOutside(Layout):
    def forward(self, y: Tensor) -> Tensor:
        return y.view(-1, 2, 4, 4).permute(0, 3, 1, 2)


class Regrouped(Layout):
    """Two of three dims merged in another order."""

    def forward(self, y: Tensor) -> Tensor:
        return y.view(-1, 2, 4, 4).transpose(1, 2).flatten(1, 2)


class Shuffled(Layout):
    """Channels merged in another order, and cut again: a channel shuffle."""

    def forward(self, y: Tensor) -> Tensor:
        shuffled = y.view(-1, 4, 8).transpose(1, 2).flatten(1)
        return shuffled.view(-1, 4, 8)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "4x8": Heads,
    "2x4x4": Nested,
    "turned": Turned,
    "middle outside": MiddleOutside,
    "inner outside": InnerOutside,
    "regrouped": Regrouped,
    "shuffled": Shuffled,
}


def part(y: Tensor, dim: int, start: int, stop: int | None, step: int = 1) -> Tensor:
    return y[(slice(None),) * dim + (slice(start, stop, step),)]


def padded(y: Tensor, dim: int, before: int, after: int) -> Tensor:
    return F.pad(y.movedim(dim, -1), (before, after)).movedim(-1, dim)


def as_image(y: Tensor, dim: int) -> Tensor:
    """[B, C, n, 1]: the dim is the height of an image, everything else its channels."""
    return y.movedim(dim, -1).flatten(1, -2)[..., None]


OPS: dict[str, Along] = {
    # slices and pads
    "slice inside": lambda y, d: part(y, d, 1, -1),
    "slice 0:3": lambda y, d: part(y, d, 0, 3),
    "slice from 1": lambda y, d: part(y, d, 1, None),
    "slice with step": lambda y, d: part(y, d, 0, None, 2),
    "narrow": lambda y, d: y.narrow(d, 1, y.shape[d] - 1),
    "select": lambda y, d: y.select(d, 1),
    "split and swap": lambda y, d: torch.cat(y.split([1, y.shape[d] - 1], d)[::-1], d),
    "chunk and swap": lambda y, d: torch.cat(y.chunk(2, d)[::-1], d),
    "halves meet": lambda y, d: y.chunk(2, d)[0] * y.chunk(2, d)[1],
    "glu": lambda y, d: F.glu(y, d),
    "part of it summed": lambda y, d: part(y, d, 1, None).sum(d),
    "part of it averaged": lambda y, d: part(y, d, 0, 3).mean(d),
    "unbind": lambda y, d: torch.stack(y.unbind(d)[::-1], d),
    "pad": lambda y, d: padded(y, d, 1, 2),
    "negative pad": lambda y, d: padded(y, d, -1, 0),
    "negative pad at the end": lambda y, d: padded(y, d, 0, -1),
    "pad and cut": lambda y, d: padded(y, d, 2, -1),
    "write to a part": lambda y, d: _written(y, d),
    "write an entry": lambda y, d: torch.select_scatter(y, y.select(d, 0).tanh(), d, 1),
    # movement
    "flip": lambda y, d: y.flip(d),
    "roll": lambda y, d: y.roll(1, d),
    "repeat": lambda y, d: torch.cat([y, y], d),
    "index_select": lambda y, d: y.index_select(d, torch.tensor([1, 0])),
    "gather": lambda y, d: y.gather(d, torch.zeros_like(y, dtype=torch.long)),
    "unfold": lambda y, d: y.unfold(d, 2, 1),
    "moved inside": lambda y, d: y.movedim(d, -1),
    "moved outside": lambda y, d: y.movedim(d, 1),
    "cat with one turned": lambda y, d: torch.cat([y, y.flip(d)], d),
    "stack with one turned": lambda y, d: torch.stack([y, y.flip(d)], d),
    # order and scans
    "sort": lambda y, d: y.sort(d).values,
    "sort stably": lambda y, d: y.sort(dim=d, stable=True).values,
    "argsort": lambda y, d: y.argsort(d).to(y.dtype),
    "msort": lambda y, d: torch.msort(y.movedim(d, 0)).movedim(0, d),
    "topk": lambda y, d: y.topk(2, d).values,
    "topk without dim": lambda y, d: y.movedim(d, -1).topk(2).values,
    "kthvalue": lambda y, d: y.kthvalue(2, d).values,
    "kthvalue keepdim": lambda y, d: y.kthvalue(1, d, keepdim=True).values,
    "median": lambda y, d: y.median(d).values,
    "nanmedian": lambda y, d: y.nanmedian(d).values,
    "mode": lambda y, d: y.mode(d).values,
    "cumsum": lambda y, d: y.cumsum(d),
    "cumprod": lambda y, d: y.cumprod(d),
    "cummax": lambda y, d: y.cummax(d).values,
    "cummin": lambda y, d: y.cummin(d).values,
    "logcumsumexp": lambda y, d: y.logcumsumexp(d),
    "diff": lambda y, d: y.diff(dim=d),
    "trapezoid": lambda y, d: torch.trapezoid(y, dim=d),
    "cumulative trapezoid": lambda y, d: torch.cumulative_trapezoid(y, dim=d),
    "fft": lambda y, d: torch.fft.fft(y, dim=d).real,
    "rfft": lambda y, d: torch.view_as_real(torch.fft.rfft(y, dim=d)),
    # reductions and normalisations
    "sum": lambda y, d: y.sum(d),
    "mean keepdim": lambda y, d: y - y.mean(d, keepdim=True),
    "var": lambda y, d: y.var(d, unbiased=False),
    "norm": lambda y, d: F.normalize(y, dim=d),
    "amax": lambda y, d: y.amax(d),
    "aminmax": lambda y, d: y.aminmax(dim=d).min + y.aminmax(dim=d).max,
    "max and its index": lambda y, d: y.max(d).values + y.max(d).indices,
    "argmin": lambda y, d: y.argmin(d, keepdim=True) + y,
    "prod": lambda y, d: y.prod(d),
    "logsumexp": lambda y, d: y.logsumexp(d),
    "softmax": lambda y, d: y.softmax(d),
    "log_softmax": lambda y, d: y.log_softmax(d),
    "any": lambda y, d: (y > 0).any(d, keepdim=True) * y,
    "renorm": lambda y, d: y.renorm(2, d, 1.0),
    "layer_norm": lambda y, d: F.layer_norm(y.movedim(d, -1), (y.shape[d],)),
    "rms_norm": lambda y, d: F.rms_norm(y.movedim(d, -1), (y.shape[d],)),
    "instance_norm": lambda y, d: F.instance_norm(y.movedim(d, 1).flatten(2)),
    # windows
    "max_pool": lambda y, d: F.max_pool2d(as_image(y, d), (2, 1)),
    "avg_pool": lambda y, d: F.avg_pool2d(as_image(y, d), (2, 1), 1),
    "adaptive_avg_pool": lambda y, d: F.adaptive_avg_pool2d(as_image(y, d), (2, 1)),
    "interpolate": lambda y, d: F.interpolate(as_image(y, d), scale_factor=(2.0, 1.0)),
    "reflect": lambda y, d: F.pad(as_image(y, d), (0, 0, 1, 1), mode="reflect"),
    "im2col": lambda y, d: F.unfold(as_image(y, d), (2, 1)),
    # products
    "products of rows": lambda y, d: y.movedim(d, 1).flatten(2) @ y.movedim(d, 1).flatten(2).mT,
    "distances": lambda y, d: torch.cdist(y.movedim(d, 1).flatten(2), y.movedim(d, 1).flatten(2)),
    "attention": lambda y, d: _attention(y.movedim(d, 1)),
    "outer": lambda y, d: y.movedim(d, -1).unsqueeze(-1) * y.movedim(d, -1).unsqueeze(-2),
    "an entry by itself": lambda y, d: y * y.select(d, 0).unsqueeze(d),
}


def _written(y: Tensor, dim: int) -> Tensor:
    y = y.movedim(dim, -1).clone()
    y[..., :2] = y[..., :2].tanh()
    return y


def _attention(y: Tensor) -> Tensor:
    q = y.flatten(2).unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q)


class Grid(nn.Module):
    """[B, 6] -> 32 channels in a layout, an op along one dim, a layer."""

    def __init__(self, layout: str, op: str, dim: int) -> None:
        super().__init__()
        self.first, self.layout = nn.Linear(6, 32), LAYOUTS[layout]()
        self.op = lambda y: OPS[op](y, dim)  # a number of the model's own could be taken for a width
        with torch.no_grad():
            width = self.middle(torch.randn(2, 6)).shape[1]
        self.last = nn.Linear(width, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.op(self.layout(self.first(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x))


def dims(layout: str) -> range:
    """The dims that the channels are seen as."""
    return range(1, LAYOUTS[layout]()(torch.zeros(1, 32)).dim())
