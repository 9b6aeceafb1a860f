"""Time series."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DLinear(nn.Module):
    """A trend and the rest, each by one layer (Zeng et al., 2023)."""

    def __init__(self, length: int = 24, ahead: int = 8) -> None:
        super().__init__()
        self.trend, self.rest, self.mix = nn.Linear(length, 16), nn.Linear(length, 16), nn.Linear(16, ahead)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.cat([x[:, :1].repeat(1, 2, 1), x, x[:, -1:].repeat(1, 2, 1)], 1)
        mean = F.avg_pool1d(padded.transpose(1, 2), 5, 1)
        return self.mix(self.trend(mean) + self.rest(x.transpose(1, 2) - mean)).transpose(1, 2)


class PatchTST(nn.Module):
    """Patches of each series by itself (Nie et al., 2023)."""

    def __init__(self, width: int = 16, patch: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.patch, self.heads = patch, heads
        self.embed, self.place = nn.Linear(patch, width), nn.Parameter(torch.randn(3, width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.ff = (
            nn.BatchNorm1d(width),
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)),
        )
        self.head = nn.Linear(3 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(1, keepdim=True), torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        z = ((x - mean) / std).transpose(1, 2).unfold(-1, self.patch, self.patch)
        b, m, n, _ = z.shape
        z = (self.embed(z) + self.place).reshape(b * m, n, -1)
        q, k, v = (f(z).view(b * m, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b * m, n, -1)
        z = self.norm((z + self.o(y)).transpose(1, 2)).transpose(1, 2)
        z = z + self.ff(z)
        return self.head(z.reshape(b, m, -1)).transpose(1, 2) * std + mean


class TimesNet(nn.Module):
    """The period that the spectrum shows, folded into a plane (Wu et al., 2023)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(3, width), nn.Linear(width, 3)
        self.kernels = nn.ModuleList(nn.Conv2d(width, width, 2 * i + 1, padding=i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        power = torch.fft.rfft(x, dim=1).abs().mean(0).mean(-1)
        power[0] = 0
        top = torch.topk(power, 1)[1].detach().cpu().numpy()
        period = x.shape[1] // int(top[0])
        length = -(-x.shape[1] // period) * period
        padded = torch.cat([y, torch.zeros(y.shape[0], length - y.shape[1], y.shape[2])], 1)
        plane = padded.reshape(y.shape[0], length // period, period, -1).permute(0, 3, 1, 2)
        plane = torch.stack([kernel(plane) for kernel in self.kernels], -1).mean(-1)
        return self.last(y + plane.permute(0, 2, 3, 1).reshape(y.shape[0], length, -1)[:, : y.shape[1]])


class Fourier(nn.Module):
    """Frequencies that are picked by number, each with its own weights (Zhou et al., FEDformer, 2022)."""

    def __init__(self, width: int = 16, heads: int = 4, modes: tuple[int, ...] = (0, 1, 3)) -> None:
        super().__init__()
        self.heads, self.modes = heads, modes
        self.q, self.o = nn.Linear(3, width), nn.Linear(width, 3)
        self.real = nn.Parameter(torch.randn(heads, width // heads, width // heads, len(modes)))
        self.imag = nn.Parameter(torch.randn(heads, width // heads, width // heads, len(modes)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).permute(0, 2, 3, 1)
        spectrum = torch.fft.rfft(q, dim=-1)
        out = torch.zeros(b, self.heads, q.shape[2], n // 2 + 1, dtype=torch.cfloat)
        weights = torch.complex(self.real, self.imag)
        for place, mode in enumerate(self.modes):
            out[..., place] = torch.einsum("bhi,hio->bho", spectrum[..., mode], weights[..., place])
        return self.o(torch.fft.irfft(out, n=n, dim=-1).permute(0, 3, 1, 2).reshape(b, n, -1))


class TCN(nn.Module):
    """Dilated causal convolutions whose ends are cut off (Bai et al., 2018)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(a, width, 3, padding=2 * d, dilation=d) for a, d in ((3, 1), (width, 2), (width, 4))
        )
        self.skip, self.last = nn.Conv1d(3, width, 1), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = layer(x)[:, :, : -layer.padding[0]].contiguous().relu()
            x = y + (self.skip(x) if i == 0 else x)
        return self.last(x[:, :, -1])


class NBeats(nn.Module):
    """Blocks that explain a part and pass on the rest (Oreshkin et al., 2020)."""

    def __init__(self, length: int = 12, ahead: int = 4, width: int = 16) -> None:
        super().__init__()
        self.length, self.ahead = length, ahead
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(length, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, length + ahead),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        forecast = x.new_zeros(x.shape[0], self.ahead)
        for block in self.blocks:
            theta = block(x)
            x, forecast = x - theta[:, : self.length], forecast + theta[:, -self.ahead :]
        return forecast


MODELS = {
    "dlinear": lambda: (DLinear(), torch.randn(2, 24, 3)),
    "patchtst": lambda: (PatchTST(), torch.randn(2, 24, 3)),
    "timesnet": lambda: (TimesNet(), torch.randn(2, 24, 3)),
    "fedformer": lambda: (Fourier(), torch.randn(2, 12, 3)),
    "tcn": lambda: (TCN(), torch.randn(2, 3, 12)),
    "nbeats": lambda: (NBeats(), torch.randn(2, 12)),
}
