"""Speech enhancement and source separation."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvTasNet(nn.Module):
    """Masks on a learned basis, from dilated convolutions (Luo and Mesgarani, 2019)."""

    def __init__(self, basis: int = 24, width: int = 16, hidden: int = 32, speakers: int = 2) -> None:
        super().__init__()
        self.speakers, self.basis = speakers, basis
        self.encoder = nn.Conv1d(1, basis, 16, stride=8, bias=False)
        self.norm, self.inner = nn.GroupNorm(1, basis), nn.Conv1d(basis, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden),
                nn.Conv1d(hidden, hidden, 3, padding=2**i, dilation=2**i, groups=hidden), nn.PReLU(),
                nn.GroupNorm(1, hidden), nn.Conv1d(hidden, width, 1),
            )
            for i in range(3)
        )  # fmt: skip
        self.mask = nn.Conv1d(width, basis * speakers, 1)
        self.decoder = nn.ConvTranspose1d(basis, 1, 16, stride=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base = self.encoder(x)
        y = self.inner(self.norm(base))
        for block in self.blocks:
            y = y + block(y)
        masks = self.mask(y).view(x.shape[0], self.speakers, self.basis, -1).sigmoid()
        parts = (base[:, None] * masks).flatten(0, 1)
        return self.decoder(parts).view(x.shape[0], self.speakers, -1)


class DPRNN(nn.Module):
    """Recurrent layers within chunks and across them (Luo et al., 2020)."""

    def __init__(self, width: int = 16, hidden: int = 12, chunk: int = 8) -> None:
        super().__init__()
        self.chunk = chunk
        self.first, self.last = nn.Conv1d(2, width, 1), nn.Conv1d(width, 2, 1)
        self.inside = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.across = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.back = nn.ModuleList(nn.Linear(2 * hidden, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        b, c, t = y.shape
        y = y.view(b, c, t // self.chunk, self.chunk)
        inner = y.permute(0, 2, 3, 1).reshape(-1, self.chunk, c)
        inner = self.back[0](self.inside(inner)[0]).view(b, -1, self.chunk, c).permute(0, 3, 1, 2)
        y = y + self.norms[0](inner)
        outer = y.permute(0, 3, 2, 1).reshape(b * self.chunk, -1, c)
        outer = self.back[1](self.across(outer)[0]).view(b, self.chunk, -1, c).permute(0, 3, 2, 1)
        return self.last((y + self.norms[1](outer)).reshape(b, c, t))


class Demucs(nn.Module):
    """A U-Net of gated convolutions with a recurrent bottom (Defossez et al., 2019)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [1, width, 2 * width]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, b, 8, 4, 2), nn.ReLU(), nn.Conv1d(b, 2 * b, 1), nn.GLU(1))
            for a, b in itertools.pairwise(sizes)
        )
        self.lstm = nn.LSTM(2 * width, 2 * width, bidirectional=True)
        self.bottom = nn.Linear(4 * width, 2 * width)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv1d(b, 2 * b, 3, padding=1), nn.GLU(1), nn.ConvTranspose1d(b, a, 8, 4, 2))
            for a, b in reversed(list(itertools.pairwise(sizes)))
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.bottom(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        for up in self.up:
            x = up(x + skips.pop())
        return x


class CRN(nn.Module):
    """Convolutions over frequency, a recurrent layer over time, and back (Tan and Wang, 2018)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, width, (1, 3), (1, 2)), nn.Conv2d(width, 2 * width, (1, 3), (1, 2))
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.gru = nn.GRU(2 * width * 7, 2 * width * 7, batch_first=True)
        self.c = nn.ConvTranspose2d(4 * width, width, (1, 3), (1, 2))
        self.d = nn.ConvTranspose2d(2 * width, 2, (1, 3), (1, 2), output_padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        one = F.elu(self.na(self.a(x)))
        two = F.elu(self.nb(self.b(one)))
        b, c, t, f = two.shape
        y, _ = self.gru(two.transpose(1, 2).reshape(b, t, c * f))
        y = y.view(b, t, c, f).transpose(1, 2)
        y = F.elu(self.c(torch.cat([y, two], 1)))
        return self.d(torch.cat([y, one], 1))


class FullSubNet(nn.Module):
    """A model of all bands, then one of each band with its neighbours (Hao et al., 2021)."""

    def __init__(self, bands: int = 17, near: int = 2, hidden: int = 16) -> None:
        super().__init__()
        self.near = near
        self.full, self.spread = nn.LSTM(bands, hidden, batch_first=True), nn.Linear(hidden, bands)
        self.sub, self.out = nn.LSTM(2 * near + 2, hidden, batch_first=True), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, f, t = x.shape
        whole = self.spread(self.full(x.transpose(1, 2))[0]).relu().transpose(1, 2)
        padded = F.pad(x[:, None], (0, 0, self.near, self.near), mode="reflect")[:, 0]
        around = padded.unfold(1, 2 * self.near + 1, 1).transpose(2, 3)
        both = torch.cat([around, whole[:, :, None]], 2).reshape(b * f, 2 * self.near + 2, t)
        return self.out(self.sub(both.transpose(1, 2))[0]).view(b, f, t, 2)


MODELS = {
    "conv_tasnet": lambda: (ConvTasNet(), torch.randn(2, 1, 128)),
    "dprnn": lambda: (DPRNN(), torch.randn(2, 2, 32)),
    "demucs": lambda: (Demucs(), torch.randn(2, 1, 256)),
    "crn": lambda: (CRN(), torch.randn(2, 2, 6, 32)),
    "fullsubnet": lambda: (FullSubNet(), torch.rand(2, 17, 6)),
}
