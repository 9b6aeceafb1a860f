"""Point clouds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointNet(nn.Module):
    """Layers for each point, a learned turn, the greatest of all (Qi et al., 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 9))
        self.one, self.two, self.norm = (
            nn.Conv1d(3, width, 1),
            nn.Conv1d(width, 2 * width, 1),
            nn.BatchNorm1d(width),
        )
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(x.mean(2)).view(-1, 3, 3) + torch.eye(3)
        y = self.norm(self.one(turn @ x)).relu()
        return self.head(torch.max(self.two(y), 2, keepdim=True)[0].view(len(x), -1))


class DGCNN(nn.Module):
    """Edges to the nearest points, found anew in each layer (Wang et al., 2019)."""

    def __init__(self, width: int = 16, near: int = 4) -> None:
        super().__init__()
        self.near = near
        self.layers = nn.ModuleList(nn.Conv2d(2 * a, width, 1) for a in (3, width))
        self.head = nn.Linear(4 * width, 5)

    def edges(self, x: Tensor) -> Tensor:
        b, c, n = x.shape
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        square = torch.sum(x**2, dim=1, keepdim=True)
        index = (-square - inner - square.transpose(2, 1)).topk(k=self.near, dim=-1)[1]
        index = (index + torch.arange(b).view(-1, 1, 1) * n).view(-1)
        flat = x.transpose(2, 1).contiguous()
        other = flat.view(b * n, -1)[index].view(b, n, self.near, c)
        own = flat.view(b, n, 1, c).repeat(1, 1, self.near, 1)
        return torch.cat((other - own, own), dim=3).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            x = F.leaky_relu(layer(self.edges(x)), 0.2).max(dim=-1)[0]
            found.append(x)
        y = torch.cat(found, 1)
        return self.head(
            torch.cat((F.adaptive_max_pool1d(y, 1).flatten(1), F.adaptive_avg_pool1d(y, 1).flatten(1)), 1)
        )


class PointTransformer(nn.Module):
    """Attention by differences, for each channel (Zhao et al., 2021)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 5)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.place = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.weigh = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        place = self.place(x[:, :, None] - x[:, None])
        weights = self.weigh(self.q(y)[:, :, None] - self.k(y)[:, None] + place)
        weights = torch.softmax(weights / y.shape[-1] ** 0.5, dim=2)
        return self.last((y + torch.einsum("bmnf,bmnf->bmf", weights, self.v(y)[:, None] + place)).mean(1))


class PointNet2(nn.Module):
    """Groups around sampled points (Qi et al., 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(6, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.whole = nn.Sequential(nn.Conv1d(width + 3, 2 * width, 1), nn.ReLU())
        self.back, self.out = nn.Conv1d(2 * width, width, 1), nn.Conv1d(width + 3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        start = torch.randint(0, n - 4, (1,))
        centres = x[:, start + torch.arange(4)]
        near = torch.cdist(centres, x).topk(3, largest=False)[1]
        around = x[torch.arange(b)[:, None, None], near]
        local = torch.cat([around - centres[:, :, None], around], -1).permute(0, 3, 2, 1)
        y = self.whole(torch.cat([centres.transpose(1, 2), self.local(local).max(2)[0]], 1)).max(
            2, keepdim=True
        )[0]
        return self.out(torch.cat([self.back(y).expand(-1, -1, n), x.transpose(1, 2)], 1))


MODELS = {
    "pointnet": lambda: (PointNet(), torch.randn(2, 3, 10)),
    "dgcnn": lambda: (DGCNN(), torch.randn(2, 3, 10)),
    "point_transformer": lambda: (PointTransformer(), torch.randn(2, 6, 3)),
    "pointnet2": lambda: (PointNet2(), torch.randn(2, 10, 3)),
}
