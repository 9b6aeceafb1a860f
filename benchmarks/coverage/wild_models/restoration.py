"""Super-resolution and denoising."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EDSR(nn.Module):
    """Residual blocks without norms and a pixel shuffle (Lim et al., 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(2)
        )
        self.up, self.tail = (
            nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.head(x)
        for block in self.body:
            y = y + 0.1 * block(y)
        return self.tail(self.up(y + first))


class RDN(nn.Module):
    """Dense blocks with a local fusion (Zhang et al., 2018)."""

    def __init__(self, width: int = 12, growth: int = 6) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.dense = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(3))
        self.fuse = nn.Conv2d(width + 3 * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        found = [first]
        for layer in self.dense:
            found.append(layer(torch.cat(found, 1)).relu())
        return F.pixel_shuffle(self.tail(first + self.fuse(torch.cat(found, 1))), 2)


class IMDN(nn.Module):
    """Parts of the channels are kept at each step, the rest goes on (Hui et al., 2019)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.kept, self.rest = width // 4, width - width // 4
        self.head, self.tail = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.c1 = nn.Conv2d(width, width, 3, padding=1)
        self.c2, self.c3 = (
            nn.Conv2d(self.rest, width, 3, padding=1),
            nn.Conv2d(self.rest, self.kept, 3, padding=1),
        )
        self.squeeze, self.excite = nn.Conv2d(3 * self.kept, 4, 1), nn.Conv2d(4, 3 * self.kept, 1)
        self.fuse = nn.Conv2d(3 * self.kept, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        kept1, rest = torch.split(F.leaky_relu(self.c1(x), 0.05), (self.kept, self.rest), dim=1)
        kept2, rest = torch.split(F.leaky_relu(self.c2(rest), 0.05), (self.kept, self.rest), dim=1)
        y = torch.cat([kept1, kept2, self.c3(rest)], dim=1)
        contrast = y.std((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True)
        y = y * self.excite(self.squeeze(contrast).relu()).sigmoid()
        return F.pixel_shuffle(self.tail(self.fuse(y) + x), 2)


class NAFNet(nn.Module):
    """Gates in the place of activations (Chen et al., 2022)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.intro, self.end = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norm, self.one = nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 1)
        self.deep, self.two = (
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            nn.Conv2d(width, width, 1),
        )
        self.attend = nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.full((1, width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.intro(x)
        a, b = self.deep(self.one(self.norm(y))).chunk(2, dim=1)
        z = a * b
        z = z * self.attend(z.mean((2, 3), keepdim=True))
        return x + self.end(y + self.two(z) * self.beta)


class Restormer(nn.Module):
    """Attention between channels, not places (Zamir et al., 2022)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.head, self.tail, self.norm = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.LayerNorm(width),
        )
        self.qkv, self.deep = (
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width),
        )
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        b, c, h, w = y.shape
        z = self.norm(y.flatten(2).transpose(1, 2)).transpose(1, 2).view(b, c, h, w)
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.deep(self.qkv(z)).chunk(3, dim=1))
        weights = (
            F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        ).softmax(-1)
        return x + self.tail(y + self.out((weights @ v).reshape(b, -1, h, w)))


class DnCNN(nn.Module):
    """The noise, to be subtracted (Zhang et al., 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x)


MODELS = {
    "edsr": lambda: (EDSR(), torch.rand(2, 3, 8, 8)),
    "rdn": lambda: (RDN(), torch.rand(2, 3, 8, 8)),
    "imdn": lambda: (IMDN(), torch.rand(2, 3, 8, 8)),
    "nafnet": lambda: (NAFNet(), torch.rand(2, 3, 8, 8)),
    "restormer": lambda: (Restormer(), torch.rand(2, 3, 8, 8)),
    "dncnn": lambda: (DnCNN(), torch.rand(2, 1, 8, 8)),
}
