"""Pose, tracking and video."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Hourglass(nn.Module):
    """Down and up again with a branch at each size (Newell et al., 2016)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pre, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 4, 1)
        self.skip = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.low = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x).relu()
        sides = []
        for skip, low in zip(self.skip, self.low, strict=True):
            sides.append(skip(x))
            x = low(F.max_pool2d(x, 2)).relu()
        for side in reversed(sides):
            x = F.interpolate(x, scale_factor=2.0) + side
        return self.out(x)


class HRNet(nn.Module):
    """Two resolutions that are added to each other (Sun et al., 2019)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.lower = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up, self.down = nn.Conv2d(2 * width, width, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Conv2d(3 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x).relu()
        low = self.lower(high).relu()
        high, low = self.a(high).relu(), self.b(low).relu()
        high, low = high + F.interpolate(self.up(low), scale_factor=2.0), low + self.down(high)
        return self.head(torch.cat([high, F.interpolate(low, size=high.shape[2:])], 1))


class SimCC(nn.Module):
    """Places along x and y as classes (Li et al., 2022)."""

    def __init__(self, width: int = 16, joints: int = 4) -> None:
        super().__init__()
        self.joints = joints
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, joints, 3, padding=1)
        )
        self.embed, self.gate = nn.Linear(16, 24), nn.Linear(24, 48)
        self.x, self.y = nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        y = self.embed(self.body(image).flatten(2))
        a, b = self.gate(y).chunk(2, -1)
        y = y + a * F.silu(b)
        return self.x(y), self.y(y)


class SiamRPN(nn.Module):
    """The template as the kernel of a correlation (Li et al., 2018)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)
        )
        self.kernel, self.search, self.head = (
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, 6, 1),
        )

    def forward(self, template: Tensor, image: Tensor) -> Tensor:
        kernel, x = self.kernel(self.body(template)), self.search(self.body(image))
        b, c, h, w = kernel.shape
        out = F.conv2d(x.view(1, b * c, *x.shape[2:]), kernel.view(b * c, 1, h, w), groups=b * c)
        return self.head(out.view(b, c, *out.shape[2:]))


class MixFormer(nn.Module):
    """Attention of template and search image as one sequence (Cui et al., 2022)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch, self.qkv, self.proj = (
            nn.Conv2d(3, width, 4, 4),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Conv2d(width, 5, 1)

    def forward(self, template: Tensor, image: Tensor) -> Tensor:
        t, s = self.patch(template), self.patch(image)
        nt, (h, w) = t.shape[2] * t.shape[3], s.shape[2:]
        x = torch.cat([t.flatten(2).transpose(1, 2), s.flatten(2).transpose(1, 2)], 1)
        b, n, c = x.shape
        q, k, v = (
            self.qkv(self.norm(x))
            .reshape(b, n, 3, self.heads, c // self.heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        own = F.scaled_dot_product_attention(q[:, :, :nt], k[:, :, :nt], v[:, :, :nt])
        both = F.scaled_dot_product_attention(q[:, :, nt:], k, v)
        x = x + self.proj(torch.cat([own, both], 2).transpose(1, 2).reshape(b, n, c))
        return self.head(x[:, nt:].transpose(1, 2).reshape(b, c, h, w))


class TSM(nn.Module):
    """Parts of the channels move in time (Lin et al., 2019)."""

    def __init__(self, width: int = 16, frames: int = 4) -> None:
        super().__init__()
        self.frames = frames
        self.one, self.two, self.fc = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Linear(width, 5),
        )

    def shift(self, x: Tensor) -> Tensor:
        nt, c, h, w = x.size()
        x, fold = x.view(nt // self.frames, self.frames, c, h, w), c // 8
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return out.view(nt, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x.flatten(0, 1)).relu()
        y = (y + self.two(self.shift(y))).relu().mean((2, 3))
        return self.fc(y).view(-1, self.frames, 5).mean(1)


class SlowFast(nn.Module):
    """Two rates of frames, the fast one joined to the slow one (Feichtenhofer et al., 2019)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.slow1, self.slow2 = (
            nn.Conv3d(3, width, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(width + width // 2, width, 1),
        )
        self.fast1, self.fast2 = (
            nn.Conv3d(3, width // 4, 3, padding=1),
            nn.Conv3d(width // 4, width // 4, 3, padding=1),
        )
        self.lateral, self.fc = (
            nn.Conv3d(width // 4, width // 2, (5, 1, 1), (4, 1, 1), (2, 0, 0)),
            nn.Linear(width + width // 4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = self.slow1(x[:, :, ::4]).relu(), self.fast1(x).relu()
        slow = self.slow2(torch.cat([slow, self.lateral(fast)], 1)).relu()
        fast = self.fast2(fast).relu()
        return self.fc(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))


class ConvLSTM(nn.Module):
    """A recurrent cell of convolutions (Shi et al., 2015)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.gates, self.out = nn.Conv2d(3 + width, 4 * width, 3, padding=1), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, h, w = x.shape
        state = cell = torch.zeros(b, self.width, h, w)
        for frame in x.unbind(1):
            i, f, o, g = torch.split(self.gates(torch.cat([frame, state], 1)), self.width, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
        return self.out(state)


class TimeSformer(nn.Module):
    """Attention over time, then over places (Bertasius et al., 2021)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 5)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def attend(self, x: Tensor, which: int) -> Tensor:
        *lead, n, c = x.shape
        q, k, v = (
            t.view(*lead, n, self.heads, -1).transpose(-3, -2) for t in self.qkv[which](x).chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
        return x + self.proj[which]((weights @ v).transpose(-3, -2).reshape(*lead, n, c))

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[:2]
        y = self.patch(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (b, t))
        y = self.attend(y.transpose(1, 2), 0).transpose(1, 2)
        return self.head(self.attend(y, 1).mean((1, 2)))


MODELS = {
    "hourglass": lambda: (Hourglass(), torch.rand(2, 3, 8, 8)),
    "hrnet": lambda: (HRNet(), torch.rand(2, 3, 16, 16)),
    "simcc": lambda: (SimCC(), torch.rand(2, 3, 8, 8)),
    "siamrpn": lambda: (SiamRPN(), (torch.rand(2, 3, 7, 7), torch.rand(2, 3, 12, 12))),
    "mixformer": lambda: (MixFormer(), (torch.rand(2, 3, 8, 8), torch.rand(2, 3, 12, 12))),
    "tsm": lambda: (TSM(), torch.rand(2, 4, 3, 6, 6)),
    "slowfast": lambda: (SlowFast(), torch.rand(2, 3, 8, 6, 6)),
    "conv_lstm": lambda: (ConvLSTM(), torch.rand(2, 3, 3, 6, 6)),
    "timesformer": lambda: (TimeSformer(), torch.rand(2, 3, 3, 8, 8)),
}
