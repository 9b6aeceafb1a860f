"""State spaces, and networks of splines (KAN)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mamba(nn.Module):
    """A scan whose steps hang on the input (Gu and Dao, 2023)."""

    def __init__(self, width: int = 12, state: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.inner, self.state, self.rank = 2 * width, state, rank
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.inward, self.conv = (
            nn.Linear(width, 2 * self.inner, bias=False),
            nn.Conv1d(self.inner, self.inner, 3, groups=self.inner, padding=2),
        )
        self.x, self.dt = nn.Linear(self.inner, rank + 2 * state, bias=False), nn.Linear(rank, self.inner)
        self.log = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(self.inner, 1))
        self.skip, self.out = nn.Parameter(torch.ones(self.inner)), nn.Linear(self.inner, width, bias=False)

    def scan(self, x: Tensor) -> Tensor:
        dt, b, c = self.x(x).split([self.rank, self.state, self.state], dim=-1)
        dt = F.softplus(self.dt(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.log))
        fed = dt.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        h, ys = torch.zeros(x.shape[0], self.inner, self.state), []
        for i in range(x.shape[1]):
            h = decay[:, i] * h + fed[:, i]
            ys.append((h @ c[:, i].unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, 1) + x * self.skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y, gate = self.inward(x).chunk(2, dim=-1)
        y = F.silu(self.conv(y.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2))
        return self.last(x + self.out(self.scan(y) * F.silu(gate)))


class S4D(nn.Module):
    """A long convolution of diagonal states (Gu et al., 2022)."""

    def __init__(self, width: int = 12, state: int = 4) -> None:
        super().__init__()
        self.first, self.mix, self.last = (
            nn.Linear(5, width),
            nn.Conv1d(width, 2 * width, 1),
            nn.Linear(width, 3),
        )
        self.step, self.real = nn.Parameter(torch.rand(width) - 3), nn.Parameter(torch.rand(width, state))
        self.imag, self.c, self.d = (
            nn.Parameter(torch.rand(width, state)),
            nn.Parameter(torch.randn(width, state, 2)),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x).transpose(1, 2)
        n = u.shape[-1]
        a = torch.complex(-torch.exp(self.real), self.imag) * torch.exp(self.step)[:, None]
        powers = torch.exp(a[..., None] * torch.arange(n))
        kernel = 2 * torch.einsum("hs,hsl->hl", torch.view_as_complex(self.c), powers).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        y = F.glu(self.mix(F.gelu(y + u * self.d[:, None])), dim=1)
        return self.last((y + u).transpose(1, 2))


class RWKV(nn.Module):
    """Mixes with the step before, and a decay for each channel (Peng et al., 2023)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.rand(1, 1, width)) for _ in range(3))
        self.key, self.value, self.receive, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay, self.bonus = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        before = F.pad(x, (0, 0, 1, -1))
        k = self.key(x * self.mix_k + before * (1 - self.mix_k))
        v = self.value(x * self.mix_v + before * (1 - self.mix_v))
        r = self.receive(x * self.mix_r + before * (1 - self.mix_r)).sigmoid()
        above = below = torch.zeros(x.shape[0], x.shape[2])
        outs = []
        for i in range(x.shape[1]):
            now = torch.exp(self.bonus + k[:, i])
            outs.append((above + now * v[:, i]) / (below + now))
            above = torch.exp(-self.decay) * above + torch.exp(k[:, i]) * v[:, i]
            below = torch.exp(-self.decay) * below + torch.exp(k[:, i])
        return self.last(x + self.out(r * torch.stack(outs, 1)))


class KAN(nn.Module):
    """Splines on the edges (Liu et al., 2024)."""

    def __init__(self, sizes: tuple[int, ...] = (4, 12, 3), grid: int = 4) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.base = nn.ParameterList(torch.randn(b, a) for a, b in pairs)
        self.spline = nn.ParameterList(torch.randn(b, a, grid + 2) * 0.1 for a, b in pairs)
        self.register_buffer("knots", torch.linspace(-2, 2, grid + 5))

    def bases(self, x: Tensor, order: int = 2) -> Tensor:
        x = x.unsqueeze(-1)
        found = ((x >= self.knots[:-1]) & (x < self.knots[1:])).to(x.dtype)
        for k in range(1, order + 1):
            left = (
                (x - self.knots[: -(k + 1)]) / (self.knots[k:-1] - self.knots[: -(k + 1)]) * found[..., :-1]
            )
            right = (self.knots[k + 1 :] - x) / (self.knots[k + 1 :] - self.knots[1:-k]) * found[..., 1:]
            found = left + right
        return found

    def forward(self, x: Tensor) -> Tensor:
        for base, spline in zip(self.base, self.spline, strict=True):
            x = F.linear(F.silu(x), base) + F.linear(
                self.bases(x).flatten(1), spline.view(spline.shape[0], -1)
            )
        return x


class ChebyKAN(nn.Module):
    """Polynomials on the edges."""

    def __init__(self, width: int = 12, degree: int = 3) -> None:
        super().__init__()
        self.degree = degree
        self.one, self.two = (
            nn.Parameter(torch.randn(4, width, degree + 1)),
            nn.Parameter(torch.randn(width, 3, degree + 1)),
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("orders", torch.arange(0, degree + 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for i, weight in enumerate((self.one, self.two)):
            turned = (
                torch.acos(torch.tanh(x).clamp(-0.99, 0.99))
                .view(-1, weight.shape[0], 1)
                .expand(-1, -1, self.degree + 1)
            )
            x = torch.einsum("bid,iod->bo", (turned * self.orders).cos(), weight)
            x = self.norm(x) if i == 0 else x
        return x


MODELS = {
    "mamba": lambda: (Mamba(), torch.randn(2, 6, 5)),
    "s4d": lambda: (S4D(), torch.randn(2, 8, 5)),
    "rwkv": lambda: (RWKV(), torch.randn(2, 6, 5)),
    "kan": lambda: (KAN(), torch.rand(5, 4) * 2 - 1),
    "chebykan": lambda: (ChebyKAN(), torch.randn(5, 4)),
}
