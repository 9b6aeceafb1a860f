"""Text in images: recognition and detection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CRNN(nn.Module):
    """Convolutions whose height ends at one, then recurrent layers (Shi et al., 2015)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d((2, 1)),
            nn.Conv2d(2 * width, 2 * width, (4, 1)), nn.ReLU(),
        )  # fmt: skip
        self.rnn, self.out = nn.LSTM(2 * width, 16, num_layers=2, bidirectional=True), nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cnn(x)
        assert y.shape[2] == 1
        return self.out(self.rnn(y.squeeze(2).permute(2, 0, 1))[0])


class DBNet(nn.Module):
    """A pyramid, and two maps that differ by a threshold (Liao et al., 2020)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.side = nn.ModuleList(nn.Conv2d(n * width, 16, 1) for n in (1, 2, 4))
        self.smooth = nn.ModuleList(nn.Conv2d(16, 4, 3, padding=1) for _ in range(3))
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 8, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(8, 8, 2, 2),
                nn.ReLU(),
                nn.Conv2d(8, 1, 1),
                nn.Sigmoid(),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(x)
        sides = [side(f) for side, f in zip(self.side, found, strict=True)]
        for i in (1, 0):
            sides[i] = sides[i] + F.interpolate(sides[i + 1], scale_factor=2.0)
        maps = [F.interpolate(s(f), size=sides[0].shape[2:]) for s, f in zip(self.smooth, sides, strict=True)]
        probability, threshold = (head(torch.cat(maps, 1)) for head in self.heads)
        return torch.cat(
            [probability, threshold, torch.reciprocal(1 + torch.exp(-50 * (probability - threshold)))], 1
        )


class Transformer(nn.Module):
    """An encoder of columns and a decoder that is told the text so far (Li et al., TrOCR, 2021)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.place = (
            nn.Conv2d(1, width, (8, 4), (8, 4)),
            nn.Parameter(torch.randn(1, 16, width) * 0.1),
        )
        self.encoder = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.embed, self.decoder = (
            nn.Embedding(20, width),
            nn.TransformerDecoderLayer(width, 2, 32, batch_first=True),
        )
        self.out = nn.Linear(width, 20)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        memory = self.patches(x).flatten(2).transpose(1, 2)
        memory = self.encoder(memory + self.place[:, : memory.shape[1]])
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        return self.out(self.decoder(self.embed(text), memory, tgt_mask=mask))


class SVTR(nn.Module):
    """Local and global mixing, the height merged step by step (Du et al., 2022)."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.merge, self.last, self.head = (
            nn.Conv2d(width, 2 * width, 3, (2, 1), 1),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, 11),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        b, c, h, w = y.shape
        y = y.flatten(2).permute(0, 2, 1)
        qkv = self.qkv(self.norm(y)).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        away = torch.arange(w).repeat(h)
        far = (away[:, None] - away[None]).abs() > 1
        weights = (q @ k.permute(0, 1, 3, 2)).masked_fill(far, float("-inf")).softmax(-1)
        y = y + self.proj((weights @ v).permute(0, 2, 1, 3).reshape(b, -1, c))
        y = self.merge(y.permute(0, 2, 1).reshape(b, c, h, w)).mean(2).permute(0, 2, 1)
        return self.head(self.last(y))


MODELS = {
    "crnn": lambda: (CRNN(), torch.rand(2, 1, 16, 24)),
    "dbnet": lambda: (DBNet(), torch.rand(2, 3, 16, 16)),
    "trocr": lambda: (Transformer(), (torch.rand(2, 1, 8, 32), torch.randint(0, 20, (2, 5)))),
    "svtr": lambda: (SVTR(), torch.rand(2, 1, 8, 16)),
}
