"""Networks of other shapes: mixers, capsules, memories, hypernetworks, autoencoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """Layers over places and over channels (Tolstikhin et al., 2021)."""

    def __init__(self, width: int = 16, places: int = 4) -> None:
        super().__init__()
        self.patch, self.n1, self.n2, self.head = (
            nn.Conv2d(3, width, 4, 4),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            nn.Linear(width, 5),
        )
        self.over = nn.Sequential(nn.Linear(places, 8), nn.GELU(), nn.Linear(8, places))
        self.channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.over(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.n2(x))).mean(1))


class Capsules(nn.Module):
    """Vectors that vote (Sabour et al., 2017)."""

    def __init__(self, size: int = 4, out: int = 3) -> None:
        super().__init__()
        self.size = size
        self.conv, self.primary = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 4 * size, 3, 2)
        self.weight = nn.Parameter(torch.randn(1, 16, out, 6, size) * 0.1)

    def squash(self, x: Tensor) -> Tensor:
        square = (x**2).sum(-1, keepdim=True)
        return square / (1 + square) * x / torch.sqrt(square + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(self.conv(x).relu())
        u = self.squash(y.view(len(x), -1, self.size))[:, :, None, :, None]
        votes = (self.weight @ u).squeeze(-1)
        logits = torch.zeros(*votes.shape[:3], 1)
        for _ in range(2):
            v = self.squash((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        return v.squeeze(1).norm(dim=-1)


class VQVAE(nn.Module):
    """The nearest entry of a code book (van den Oord et al., 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, width, 1))
        self.book = nn.Embedding(10, width)
        self.decode = nn.Sequential(
            nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).permute(0, 2, 3, 1)
        flat = z.reshape(-1, self.book.embedding_dim)
        away = (flat**2).sum(1, keepdim=True) + (self.book.weight**2).sum(1) - 2 * flat @ self.book.weight.t()
        q = self.book(away.argmin(1)).view(z.shape)
        return self.decode((z + (q - z).detach()).permute(0, 3, 1, 2))


class VAE(nn.Module):
    """Means and spreads of what is drawn (Kingma and Welling, 2014)."""

    def __init__(self, width: int = 16, latent: int = 4) -> None:
        super().__init__()
        self.encode, self.mean, self.log = (
            nn.Linear(12, width),
            nn.Linear(width, latent),
            nn.Linear(width, latent),
        )
        self.decode = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encode(x).relu()
        mean, log = self.mean(h), self.log(h)
        return self.decode(mean + torch.randn_like(mean) * torch.exp(0.5 * log)), mean, log


class Hyper(nn.Module):
    """Weights made by another network (Ha et al., 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.first, self.make, self.last = (
            nn.Linear(4, width),
            nn.Linear(3, width * width),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weights = self.make(task).view(-1, self.width, self.width)
        return self.last(torch.bmm(self.first(x).relu()[:, None], weights)[:, 0].relu())


class UNet(nn.Module):
    """Noise of a step of diffusion (Ho et al., 2020)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm, self.mid, self.scale = (
            nn.GroupNorm(4, 2 * width),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.Linear(2 * width, 4 * width),
        )
        self.up, self.last = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        half = self.width // 2
        angles = step[:, None] * torch.exp(-torch.arange(half) / half * 9.2)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        one = self.first(x)
        two = self.down(F.silu(one))
        scale, shift = self.scale(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        two = two + self.mid(F.silu(self.norm(two) * (scale + 1) + shift))
        return self.last(torch.cat([self.up(two), one], 1))


class NeRF(nn.Module):
    """Sines of places, and a skip in the middle (Mildenhall et al., 2020)."""

    def __init__(self, width: int = 16, bands: int = 3) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(bands))
        inputs = 3 + 6 * bands
        self.one, self.two = nn.Linear(inputs, width), nn.Linear(width + inputs, width)
        self.density, self.feature, self.colour = (
            nn.Linear(width, 1),
            nn.Linear(width, width),
            nn.Linear(width + 3, 3),
        )

    def forward(self, x: Tensor, view: Tensor) -> Tensor:
        angles = (x[..., None] * self.bands).flatten(-2)
        e = torch.cat([x, angles.sin(), angles.cos()], -1)
        h = self.two(torch.cat([self.one(e).relu(), e], -1)).relu()
        colour = self.colour(torch.cat([self.feature(h), view], -1)).sigmoid()
        alpha = 1 - torch.exp(-self.density(h).relu())
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], 1), 1)[:, :-1]
        return (through * alpha * colour).sum(1)


class Perceiver(nn.Module):
    """Learned queries that read the input (Jaegle et al., 2021)."""

    def __init__(self, width: int = 16, queries: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.cross, self.own = (
            nn.MultiheadAttention(width, 2, kdim=5, vdim=5, batch_first=True),
            nn.MultiheadAttention(width, 2, batch_first=True),
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(len(x), -1, -1)
        q = q + self.cross(q, x, x)[0]
        return self.head(self.norm(q + self.own(q, q, q)[0]).mean(1))


MODELS = {
    "mixer": lambda: (Mixer(), torch.rand(2, 3, 8, 8)),
    "capsules": lambda: (Capsules(), torch.rand(2, 1, 8, 8)),
    "vqvae": lambda: (VQVAE(), torch.rand(2, 3, 8, 8)),
    "vae": lambda: (VAE(), torch.rand(3, 12)),
    "hypernetwork": lambda: (Hyper(), (torch.randn(3, 4), torch.randn(3, 3))),
    "diffusion_unet": lambda: (UNet(), (torch.rand(2, 3, 8, 8), torch.tensor([3.0, 7.0]))),
    "nerf": lambda: (NeRF(), (torch.randn(3, 4, 3), torch.randn(3, 4, 3))),
    "perceiver": lambda: (Perceiver(), torch.randn(2, 6, 5)),
}
