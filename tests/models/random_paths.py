"""More blocks for random networks: paths that hang on the mode or on a size, tables that grow, and inputs of other sizes.
Importing this registers the blocks.
"""

from __future__ import annotations

import copy

import torch
from random_networks import ANY, SEQUENCE, Layer, Net, Pick, Wiring, axis, block, dense, divisors, width
from torch import Tensor, nn


@block(ANY)
def by_mode(pick: Pick, x: Tensor) -> Layer:
    """While it trains it takes another layer, more layers, or numbers that eval mode never reads."""
    c = width(x)
    out = pick((c, 6, 8))
    first, second, wide = dense(x, out), dense(x, out), x.dim() - 1 == axis(x)
    heads = pick(divisors(c))

    def per_head(x: Tensor) -> Tensor:
        return x.unflatten(axis(x), (heads, c // heads)).mul(0.5).flatten(axis(x), axis(x) + 1)

    run = pick((
        lambda s, x: s.first(x) if s.training else s.second(x), lambda s, x: s.first(per_head(x) if s.training else x),
        lambda s, x: s.first(x) + s.second(x) if s.training else s.second(x),
        lambda s, x: s.first(x * s.scale if s.training and wide else x), lambda s, x: s.second(s.drop(x)) + s.first(x),
    ))  # fmt: skip
    return Net(run, first=first, second=second, scale=nn.Parameter(torch.randn(c)), drop=nn.Dropout(0.3))


@block(SEQUENCE)
def by_size(pick: Pick, x: Tensor) -> Layer:
    """Another layer for long sequences."""
    c, many, out = width(x), x.shape[1] + pick((0, 1)), pick((width(x), 6))
    run = pick((
        lambda s, x: s.long(x) if x.shape[1] > many else s.short(x), lambda s, x: s.short(x[:, :many]),
        lambda s, x: s.short(x) + (s.long(x) if x.shape[1] > many else 0),
    ))  # fmt: skip
    return Net(run, short=nn.Linear(c, out), long=nn.Linear(c, out))


class Grown(nn.Module):
    """A table of positions, made anew where a sequence is longer than any before."""

    def __init__(self, c: int, kept: str) -> None:
        super().__init__()
        self.c, self.kept, self.rows = c, kept, 0
        self.table: Tensor | None = None
        if kept == "buffer":
            del self.table
            self.register_buffer("table", torch.zeros(0, c), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept == "none" or self.table is None or x.shape[1] > self.table.shape[0]:
            steps = 1 / 10 ** (torch.arange(self.c) / self.c)
            table = torch.sin(torch.arange(x.shape[1])[:, None] * steps)
            if self.kept == "none":
                return x + table
            self.table = table
        return x + self.table[: x.shape[1]]


@block(SEQUENCE)
def grown(pick: Pick, x: Tensor) -> Layer:
    return Grown(width(x), pick(("buffer", "attribute", "none")))


def other_call(wiring: Wiring) -> tuple[Tensor, ...] | None:
    """Inputs of other sizes that the network takes; of another batch size at least, if it takes that."""
    for further in (2, 0):
        inputs = tuple(
            torch.randn(3, *[n + further if i != axis(x) - 1 else n for i, n in enumerate(x.shape[1:])])
            for x in wiring.inputs
        )
        try:
            with torch.no_grad():
                copy.deepcopy(wiring.net)(*inputs)
        except (RuntimeError, ValueError, IndexError):
            continue
        return inputs
    return None
