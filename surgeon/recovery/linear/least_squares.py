"""Normal equations, streamed: what is needed of any number of rows to solve for the best affine map, and to
judge one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 24  # entries that are widened to float64 at a time


class Normal:
    """Weighted sums over rows of [x, 1]^T [x, 1], [x, 1]^T y and y^2, in float64.

    Args:
        groups, unknowns, outputs: the shape of the map, [groups, unknowns, outputs].
    """

    def __init__(self, groups: int, unknowns: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.cross = (
            zeros(groups, unknowns + 1, unknowns + 1),
            zeros(groups, unknowns + 1, outputs),
        )
        self.square, self.count = zeros(groups, outputs), 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Rows x [groups, rows, unknowns] with what they should give, y [groups, rows, outputs], and their
        weights [rows].
        """
        rows = max(1, _CHUNK // (x.shape[0] * (x.shape[2] + 1)))
        for first in range(0, x.shape[1], rows):
            wide, want = x[:, first : first + rows].double(), y[:, first : first + rows].double()
            weight = weights[first : first + rows, None].to(wide)
            wide = torch.cat([wide, wide.new_ones(*wide.shape[:2], 1)], 2) * weight.sqrt()
            want = want * weight.sqrt()
            self.gram += wide.transpose(1, 2) @ wide
            self.cross += wide.transpose(1, 2) @ want
            self.square += want.square().sum(1)
            self.count += float(weight.sum())

    def error(self, w: Tensor, b: Tensor) -> Tensor:
        """Mean squared error of x @ w + b, [groups, outputs]."""
        full = torch.cat([w, b[:, None]], 1)
        found = (full * (self.gram @ full - 2 * self.cross)).sum(1) + self.square
        return found.clamp(min=0) / (self.count or 1)

    def solve(self, w: Tensor, b: Tensor, ridge: float, free: bool) -> tuple[Tensor, Tensor]:
        """The map of least mean squared error plus ridge * mean(x^2) * |w' - w|^2; with `free` b is solved
        for too.
        """
        count, size = (self.count or 1), w.shape[1]
        gram, cross = self.gram / count, self.cross / count
        mean = gram.diagonal(dim1=1, dim2=2)[:, :size].mean(1).clamp(min=1e-30)
        weight = (ridge * mean)[:, None, None]
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        if free:  # the constant of the best map is known given the rest: work with centred sums
            means, wanted = gram[:, -1, :size], cross[:, -1]
            inner = gram[:, :size, :size] - means[:, :, None] * means[:, None]
            outer = cross[:, :size] - means[:, :, None] * wanted[:, None]
        else:
            inner, outer = gram[:, :size, :size], cross[:, :size] - gram[:, :size, -1:] * b[:, None]
        found = torch.cholesky_solve(outer + weight * w, torch.linalg.cholesky(inner + weight * eye))
        if free:
            b = wanted - (means[:, :, None] * found).sum(1)
        return found, b

    def constant(self, w: Tensor, b: Tensor) -> Tensor:
        """The constant with which x @ w has the mean of y."""
        return b + (self._wanted_mean() - self._given_mean(w, b))

    def scaled(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The map whose results have the mean and the variance of y; outputs that do not vary stay as they
        are.
        """
        full = torch.cat([w, b[:, None]], 1)
        mean, wanted = self._given_mean(w, b), self._wanted_mean()
        spread = (full * (self.gram @ full)).sum(1) / self.count - mean.square()
        target = self.square / self.count - wanted.square()
        scale = torch.where(
            (spread > 1e-12 * target) & (target > 0), target / spread.clamp(min=1e-300), 1.0
        ).sqrt()
        return w * scale[:, None], wanted - (mean - b) * scale

    def _wanted_mean(self) -> Tensor:
        return self.cross[:, -1] / (self.count or 1)

    def _given_mean(self, w: Tensor, b: Tensor) -> Tensor:
        return (self.gram[:, -1:, :-1] @ w)[:, 0] / (self.count or 1) + b
