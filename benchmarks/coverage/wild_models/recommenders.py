"""Recommenders."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DLRM(nn.Module):
    """Products of all pairs of embeddings (Naumov et al., 2019)."""

    def __init__(self, width: int = 8, tables: int = 3) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(10, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, width))
        self.top = nn.Sequential(
            nn.Linear(width + (tables + 1) * tables // 2, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        found = [x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))]
        t = torch.cat(found, 1).view(len(x), -1, x.shape[1])
        z = torch.bmm(t, t.transpose(1, 2))
        row, column = torch.tril_indices(z.shape[1], z.shape[2], -1)
        return self.top(torch.cat([x, z[:, row, column]], 1))


class DeepFM(nn.Module):
    """Pairs by the square of sums, beside a deep network (Guo et al., 2017)."""

    def __init__(self, width: int = 8, fields: int = 4) -> None:
        super().__init__()
        self.embed, self.weight = nn.Embedding(20, width), nn.Embedding(20, 1)
        self.deep = nn.Sequential(
            nn.Linear(fields * width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embed(ids)
        pairs = 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1, keepdim=True)
        return (self.weight(ids).sum(1) + pairs + self.deep(e.flatten(1))).sigmoid()


class DCN(nn.Module):
    """Crosses with the first features (Wang et al., 2021)."""

    def __init__(self, width: int = 6, fields: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.cross = nn.ModuleList(nn.Linear(fields * width, fields * width) for _ in range(2))
        self.deep, self.out = nn.Linear(fields * width, 16), nn.Linear(fields * width + 16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.embed(ids).flatten(1)
        for layer in self.cross:
            x = first * layer(x) + x
        return self.out(torch.cat([x, self.deep(first).relu()], 1))


class MMoE(nn.Module):
    """Experts that tasks weigh by gates of their own (Ma et al., 2018)."""

    def __init__(self, experts: int = 3, width: int = 12, tasks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, width), nn.ReLU()) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(16, experts) for _ in range(tasks))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x).relu()
        found = torch.stack([expert(x) for expert in self.experts], 1)
        weights = [gate(x).softmax(-1).unsqueeze(2) for gate in self.gates]
        return [tower((found * w).sum(1)) for tower, w in zip(self.towers, weights, strict=True)]


class SASRec(nn.Module):
    """The next item by causal attention; items share their embedding with the output (Kang and McAuley, 2018)."""

    def __init__(self, width: int = 16, items: int = 30, length: int = 8) -> None:
        super().__init__()
        self.items, self.place = nn.Embedding(items, width), nn.Embedding(length, width)
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.items(ids) * self.items.embedding_dim**0.5 + self.place(torch.arange(ids.shape[1]))
        mask = ~torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool))
        y = self.norm(x)
        x = x + self.attend(y, y, y, attn_mask=mask, need_weights=False)[0]
        return (x + self.ff(x)) @ self.items.weight.t()


class DIN(nn.Module):
    """Past items weighed by the candidate (Zhou et al., 2018)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.items = nn.Embedding(30, width)
        self.unit = nn.Sequential(nn.Linear(4 * width, 12), nn.PReLU(), nn.Linear(12, 1))
        self.out = nn.Sequential(nn.Linear(2 * width, 8), nn.PReLU(), nn.Linear(8, 1))

    def forward(self, past: Tensor, candidate: Tensor) -> Tensor:
        keys, query = self.items(past), self.items(candidate)[:, None]
        wide = query.expand(-1, keys.shape[1], -1)
        weights = self.unit(torch.cat([wide, keys, wide - keys, wide * keys], -1))
        return self.out(torch.cat([(weights * keys).sum(1), query[:, 0]], -1))


MODELS = {
    "dlrm": lambda: (DLRM(), (torch.randn(3, 4), torch.randint(0, 10, (3, 3, 2)))),
    "deepfm": lambda: (DeepFM(), torch.randint(0, 20, (3, 4))),
    "dcn": lambda: (DCN(), torch.randint(0, 20, (3, 4))),
    "mmoe": lambda: (MMoE(), torch.randn(3, 8)),
    "sasrec": lambda: (SASRec(), torch.randint(0, 30, (2, 6))),
    "din": lambda: (DIN(), (torch.randint(0, 30, (3, 5)), torch.randint(0, 30, (3,)))),
}
