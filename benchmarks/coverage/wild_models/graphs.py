"""Graph networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _graph(nodes: int = 8, edges: int = 20) -> tuple[Tensor, Tensor]:
    return torch.randn(nodes, 6), torch.randint(0, nodes, (2, edges))


class GCN(nn.Module):
    """Sums over neighbours by degree (Kipf and Welling, 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, width), nn.Linear(width, 3)

    def pass_on(self, x: Tensor, edges: Tensor) -> Tensor:
        degree = torch.zeros(len(x)).scatter_add(0, edges[1], torch.ones(edges.shape[1])).clamp_min(1)
        norm = degree.rsqrt()[edges[0]] * degree.rsqrt()[edges[1]]
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * norm[:, None])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.pass_on(self.two(self.pass_on(self.one(x), edges).relu()), edges)


class GAT(nn.Module):
    """Attention over edges with several heads (Velickovic et al., 2018)."""

    def __init__(self, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.lin, self.last = nn.Linear(6, heads * size, bias=False), nn.Linear(heads * size, 3)
        self.source, self.target = (
            nn.Parameter(torch.randn(1, heads, size)),
            nn.Parameter(torch.randn(1, heads, size)),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        y = self.lin(x).view(-1, self.heads, self.size)
        score = F.leaky_relu(
            (y * self.source).sum(-1)[edges[0]] + (y * self.target).sum(-1)[edges[1]], 0.2
        ).exp()
        total = torch.zeros(len(x), self.heads).index_add(0, edges[1], score)
        message = y[edges[0]] * (score / (total[edges[1]] + 1e-6)).unsqueeze(-1)
        out = torch.zeros(len(x), self.heads, self.size).index_add(0, edges[1], message)
        return self.last(F.elu(out.view(-1, self.heads * self.size)))


class GIN(nn.Module):
    """A network on the sum of all neighbours (Xu et al., 2019)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.first, self.last = nn.Linear(6, width), nn.Linear(2 * width, 3)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * width)
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.first(x)
        around = torch.zeros_like(x).scatter_add(0, edges[1][:, None].expand(-1, x.shape[1]), x[edges[0]])
        return self.last(self.mlp((1 + self.eps) * x + around).sum(0, keepdim=True))


class Mpnn(nn.Module):
    """Messages by networks of edges, states by a GRU (Gilmer et al., 2017)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.first, self.edge, self.cell = (
            nn.Linear(6, width),
            nn.Linear(2, width * width),
            nn.GRUCell(width, width),
        )
        self.gate, self.out = nn.Linear(2 * width, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        start = h = self.first(x).relu()
        given = torch.stack([edges[0], edges[1]], 1).float() / 8
        matrices = self.edge(given).view(-1, self.width, self.width)
        for _ in range(2):
            message = torch.bmm(h[edges[0]].unsqueeze(1), matrices).squeeze(1)
            h = self.cell(torch.zeros_like(h).index_add(0, edges[1], message), h)
        return (self.gate(torch.cat([h, start], 1)).sigmoid() * self.out(h)).sum(0)


class SchNet(nn.Module):
    """Continuous filters of distances (Schuett et al., 2017)."""

    def __init__(self, width: int = 16, gaussians: int = 8) -> None:
        super().__init__()
        self.embed, self.filters = (
            nn.Embedding(5, width),
            nn.Sequential(nn.Linear(gaussians, width), nn.Softplus(), nn.Linear(width, width)),
        )
        self.lin, self.out = (
            nn.Linear(width, width, bias=False),
            nn.Sequential(nn.Linear(width, 8), nn.Softplus(), nn.Linear(8, 1)),
        )
        self.register_buffer("offsets", torch.linspace(0, 4, gaussians))

    def forward(self, kinds: Tensor, places: Tensor) -> Tensor:
        h = self.embed(kinds)
        away = torch.cdist(places, places)
        smeared = torch.exp(-10 * (away[..., None] - self.offsets) ** 2)
        weights = self.filters(smeared) * (0.5 * (torch.cos(away * 3.14 / 4) + 1))[..., None]
        return self.out(h + (weights * self.lin(h)[:, None]).sum(2)).sum(1)


MODELS = {
    "gcn": lambda: (GCN(), _graph()),
    "gat": lambda: (GAT(), _graph()),
    "gin": lambda: (GIN(), _graph()),
    "mpnn": lambda: (Mpnn(), _graph()),
    "schnet": lambda: (SchNet(), (torch.randint(0, 5, (2, 6)), torch.randn(2, 6, 3))),
}
