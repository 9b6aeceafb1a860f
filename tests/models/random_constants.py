"""More blocks for random networks: constants of the code among channels, diagonals, numbers with two roles. Importing this
registers them.
"""

from __future__ import annotations

import torch
from random_networks import (
    ANY,
    FLAT,
    SEQUENCE,
    Layer,
    Net,
    Pick,
    axis,
    block,
    divisors,
    require,
    sized,
    width,
)
from torch import Tensor, nn


@block(SEQUENCE)
def framed(pick: Pick, x: Tensor) -> Layer:
    """Constants before or behind a sequence, as causal layers put them."""
    make = pick((
        lambda x, c: torch.zeros(x.shape[0], 2, x.shape[2]), lambda x, c: x.new_ones(x.shape[0], 1, c),
        lambda x, c: torch.full((x.shape[0], 2, c), 0.5), lambda x, c: torch.zeros_like(x[:, :1]),
    ))  # fmt: skip
    first = pick((True, False))
    return sized(
        pick, lambda x, c: torch.cat([make(x, c), x] if first else [x, make(x, c)], 1)[:, :8], width(x)
    )


@block(SEQUENCE)
def filled(pick: Pick, x: Tensor) -> Layer:
    """A map of zeros that is filled place by place."""

    def run(x: Tensor, c: int) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[1], c)
        for place in range(0, x.shape[1], 2):
            out[:, place] = x[:, place].sin()
        return out

    return sized(pick, run, width(x))


@block(SEQUENCE)
def carried_state(pick: Pick, x: Tensor) -> Layer:
    """A gated state that starts with zeros, as wide as a number or another value says."""
    start = pick((
        lambda x, c: torch.zeros(x.shape[0], c), lambda x, c: x.new_zeros(x.shape[0], x.shape[2]),
        lambda x, c: torch.zeros_like(x[:, 0]),
    ))  # fmt: skip
    c = width(x)

    def run(s: nn.Module, x: Tensor) -> Tensor:
        state, states = start(x, c), []
        for item in x.unbind(1):
            gate = s.gate(torch.cat([item, state], -1)).sigmoid()
            state = gate * state + (1 - gate) * item
            states.append(state)
        return torch.stack(states, 1)

    return Net(run, gate=nn.Linear(2 * c, c))


@block(SEQUENCE)
def square(pick: Pick, x: Tensor) -> Layer:
    """A matrix over channels of which the diagonal, a triangle, or the sum with an identity counts."""
    c = width(x)
    run = pick((
        lambda x, w, c: x * torch.diagonal(w), lambda x, w, c: x @ torch.tril(w), lambda x, w, c: x @ (w + torch.eye(c)),
        lambda x, w, c: x @ torch.diag_embed(w[0]), lambda x, w, c: torch.einsum("bnd,dd->bnd", x, w),
        lambda x, w, c: x @ torch.ones(c, c) / c + x @ w,
    ))  # fmt: skip
    return Net(lambda s, x: run(x, s.mix, s.sizes[0]), mix=nn.Parameter(torch.randn(c, c) / c), sizes=(c,))


@block(ANY)
def two_roles(pick: Pick, x: Tensor) -> Layer:
    """A width that is a scale, a bound, a shift or a power as well."""
    require(axis(x) == x.dim() - 1 and width(x) > 1)
    role = pick((
        lambda x, n: x / n, lambda x, n: x.clamp(-n, n), lambda x, n: x + n, lambda x, n: x * n**-0.5,
    ))  # fmt: skip
    return sized(pick, lambda x, n: role(x.reshape(*x.shape[:-1], n), n).sin(), width(x))


@block(FLAT)
def grouped_by_number(pick: Pick, x: Tensor) -> Layer:
    """Heads by a number of the code, their size by what is left over, or the other way round."""
    run = pick((
        lambda x, h: x.view(x.shape[0], h, -1), lambda x, h: x.view(x.shape[0], -1, h), lambda x, h: x.unflatten(1, (h, -1)),
    ))  # fmt: skip
    return sized(pick, lambda x, h: run(x, h).softmax(-1).flatten(1), pick(divisors(width(x))))


@block(SEQUENCE)
def distances(pick: Pick, x: Tensor) -> Layer:
    """Weights by distances of places."""
    order = pick((1.0, 2.0))
    return lambda x: torch.cdist(x, x, p=order).softmax(-1) @ x
