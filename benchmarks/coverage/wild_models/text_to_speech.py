"""Text to speech and vocoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WaveNet(nn.Module):
    """Gates and skips over dilated causal convolutions (van den Oord et al., 2016)."""

    def __init__(self, width: int = 16, mels: int = 8) -> None:
        super().__init__()
        self.width = width
        self.first, self.one, self.two = (
            nn.Conv1d(1, width, 1),
            nn.Conv1d(width, width, 1),
            nn.Conv1d(width, 4, 1),
        )
        self.dilated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.given = nn.ModuleList(nn.Conv1d(mels, 2 * width, 1) for _ in range(3))
        self.out = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(3))

    def forward(self, x: Tensor, mel: Tensor) -> Tensor:
        x = self.first(x)
        skips = torch.zeros_like(x)
        for dilated, given, out in zip(self.dilated, self.given, self.out, strict=True):
            gated = dilated(F.pad(x, (dilated.dilation[0], 0))) + given(mel)
            value = torch.tanh(gated[:, : self.width]) * torch.sigmoid(gated[:, self.width :])
            rest, skip = out(value).split(self.width, 1)
            x, skips = x + rest, skips + skip
        return self.two(F.relu(self.one(F.relu(skips))))


class HiFiGAN(nn.Module):
    """Upsampling and residual blocks of several kernels (Kong et al., 2020)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pre, self.post = nn.Conv1d(8, width, 7, padding=3), nn.Conv1d(width // 4, 1, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(width // 2**i, width // 2 ** (i + 1), 4, 2, 1) for i in range(2)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                nn.Conv1d(width // 2 ** (i + 1), width // 2 ** (i + 1), k, padding=k // 2) for k in (3, 5)
            )
            for i in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = torch.stack([x + one(F.leaky_relu(x, 0.1)) for one in block]).mean(0)
        return torch.tanh(self.post(F.leaky_relu(x)))


class FastSpeech(nn.Module):
    """Attention over phonemes, durations, attention over frames (Ren et al., 2019)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.qkv, self.proj = (
            nn.Embedding(30, width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.conv1, self.conv2 = (
            nn.Conv1d(width, 2 * width, 3, padding=1),
            nn.Conv1d(2 * width, width, 3, padding=1),
        )
        self.duration, self.mel = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)),
            nn.Linear(width, 8),
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = self.norm1(
            x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        )
        x = self.norm2(x + self.conv2(self.conv1(x.transpose(1, 2)).relu()).transpose(1, 2))
        return self.mel(x.repeat_interleave(2, dim=1)), self.duration(x)[..., 0]


class Tacotron(nn.Module):
    """Attention that knows where it was, step by step (Shen et al., 2018)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.cell, self.pre = nn.LSTMCell(width + 8, width), nn.Linear(4, 8)
        self.query, self.memory, self.place = (
            nn.Linear(width, 12, bias=False),
            nn.Linear(width, 12),
            nn.Conv1d(1, 12, 3, padding=1),
        )
        self.energy, self.out = nn.Linear(12, 1), nn.Linear(2 * width, 4)

    def forward(self, tokens: Tensor, frames: Tensor) -> Tensor:
        memory = self.embed(tokens)
        h, c = (
            memory.new_zeros(len(tokens), self.cell.hidden_size),
            memory.new_zeros(len(tokens), self.cell.hidden_size),
        )
        context, weights, outs = torch.zeros_like(memory[:, 0]), torch.zeros_like(memory[:, :, 0]), []
        for frame in frames.unbind(1):
            h, c = self.cell(torch.cat([self.pre(frame).relu(), context], 1), (h, c))
            place = self.place(weights[:, None]).transpose(1, 2)
            energy = self.energy(torch.tanh(self.query(h)[:, None] + self.memory(memory) + place))[..., 0]
            weights = energy.softmax(-1)
            context = torch.bmm(weights[:, None], memory)[:, 0]
            outs.append(self.out(torch.cat([h, context], 1)))
        return torch.stack(outs, 1)


class Flow(nn.Module):
    """Affine couplings of halves with flips between (Kim et al., VITS, 2021)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.half = width // 2
        self.pre, self.post = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.pre.append(nn.Conv1d(width // 2, 12, 3, padding=1))
            self.post.append(nn.Conv1d(12, width, 1))
        self.first, self.last = nn.Conv1d(3, width, 1), nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for pre, post in zip(self.pre, self.post, strict=True):
            a, b = torch.split(x, [self.half] * 2, 1)
            mean, log = torch.split(post(pre(a).relu()), [self.half] * 2, 1)
            x = torch.flip(torch.cat([a, mean + b * torch.exp(log.tanh())], 1), [1])
        return self.last(x)


MODELS = {
    "wavenet": lambda: (WaveNet(), (torch.randn(2, 1, 16), torch.randn(2, 8, 16))),
    "hifigan": lambda: (HiFiGAN(), torch.randn(2, 8, 8)),
    "fastspeech": lambda: (FastSpeech(), torch.randint(0, 30, (2, 7))),
    "tacotron": lambda: (Tacotron(), (torch.randint(0, 30, (2, 6)), torch.randn(2, 3, 4))),
    "coupling_flow": lambda: (Flow(), torch.randn(2, 3, 10)),
}
