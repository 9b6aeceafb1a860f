"""Curvature: what a consumer's results would lose if weights changed, and how much the model's outputs hang on them.

Two factors, as in K-FAC (Martens and Grosse, 2015): E x x^T of what is read, and the squares of the gradients of what is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgeon.calibration.consumers import Consumer
from surgeon.calibration.windows import Layout
from surgeon.errors import InputError
from surgeon.graph import spec, where
from surgeon.rules.registry import op_name

MOST = 1200  # entries with which the taps of a convolution are entries of their own; beyond, they share one covariance
_PLACES = 1024  # places of a batch that are looked at, if patches are

Later = Callable[[], None]
Gradient = tuple[Any, Callable[[Tensor], None]]  # an edge of autograd's, and who wants its gradient


class Curvature:
    """Sums over all batches.

    Attributes:
        taps: entries of the covariance for each entry of the consumer: a convolution's taps, or 1 where they share.
        covariance: [groups, width * taps, width * taps], sum of x x^T over `count` rows.
        weight: [groups, width * taps, outputs]; None for products of data with data.
        felt: [groups, outputs], sum over samples and positions of the squared gradient of each result.
        zeroed: [groups, width], for products of data with data: sum over samples and positions of (x * gradient)^2, what the
            outputs lose to first order if an entry is zero.
    """

    def __init__(self, consumer: Consumer, widest: int) -> None:
        groups, width = consumer.shape
        if width > widest and not consumer.moving:
            raise InputError(
                f"criterion 'kfac' would need a covariance of {width} x {width} channels",
                where=where(consumer.node),
                why=f"the limit is {widest}",
                fix=f"use criterion 'variance', or criteria.KFAC(widest={width}) if memory allows",
            )
        self.consumer = consumer
        self.taps = _taps(consumer)
        if width * self.taps > MOST:
            self.taps = 1
        self.count = 0
        entries = width * self.taps
        shape = (0,) if consumer.moving else (groups, entries, entries)
        self.covariance = torch.zeros(shape, dtype=torch.float64)
        self.weight: Tensor | None = None
        self.felt = torch.zeros((), dtype=torch.float64)
        self.zeroed = torch.zeros(groups, width, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def see(self, consumer: Consumer, args: Any) -> None:
        """What one run of the consumer reads."""
        data = args[consumer.data].detach()
        if consumer.moving:
            return
        weight = args[consumer.weight].detach()
        rows = self._rows(consumer, data, weight).double()  # [groups, rows, entries]
        self.covariance += (rows.transpose(1, 2) @ rows).cpu()
        self.count += rows.shape[1]
        if self.weight is None:
            self.weight = self._matrix(consumer, weight).double().cpu()

    def _rows(self, consumer: Consumer, data: Tensor, weight: Tensor) -> Tensor:
        if self.taps == 1:
            return consumer.rows(data).flatten(0, 1).transpose(0, 1)
        seen = Layout.of(consumer.node, weight).windows(data)
        dims = weight.dim() - 2
        seen = seen.movedim(1, dims + 1)  # [N, *places, C, *kernel]
        sizes = seen.shape[: dims + 1]
        count = math.prod(sizes)
        picked = torch.randperm(count, generator=self._generator)[:_PLACES].to(data.device)
        place = torch.unravel_index(picked, sizes)
        return seen[place].reshape(len(picked), self.consumer.shape[0], -1).transpose(0, 1)

    def _matrix(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """[groups, entries, outputs] of a weight; without taps of their own, those are outputs."""
        if self.taps == 1:
            return consumer.fan(weight)
        groups = self.consumer.shape[0]
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)

    def wanted(self, consumer: Consumer, args: Any, out: Any) -> list[Gradient]:
        """The gradients to ask for, once autograd knows the result."""
        if not consumer.moving:
            known = isinstance(out, Tensor) and out.requires_grad
            return [(torch.autograd.graph.get_gradient_edge(out), self._feel)] if known else []
        data = args[consumer.data]
        if not data.requires_grad:
            return []
        value = data.detach()

        def lost(gradient: Tensor) -> None:
            self.zeroed += consumer.rows((value * gradient).double().square()).sum((0, 1)).cpu()

        return [(torch.autograd.graph.get_gradient_edge(data), lost)]

    def _feel(self, gradient: Tensor) -> None:
        assert self.weight is not None
        groups, _, outputs = self.weight.shape
        kept = self.consumer.outputs
        found = gradient.double().square()
        found = found.sum([d for d in range(found.dim()) if d not in kept]).cpu().flatten()
        if found.numel() % groups or outputs % (found.numel() // groups):  # results that no column of the weight stands for
            found = found.mean().expand(groups, outputs)
        else:
            found = found.reshape(groups, -1).repeat_interleave(outputs * groups // found.numel(), 1)
        self.felt = self.felt + found

    def error(self) -> Tensor:
        """W G W^T, [groups, entries, entries]: how the squared change of the outputs grows with that of the weights."""
        assert self.weight is not None
        felt = self.felt.expand(self.weight.shape[0], self.weight.shape[2])  # 0 of a result that the outputs do not hang on
        return (self.weight * felt[:, None]) @ self.weight.transpose(1, 2)


def _taps(consumer: Consumer) -> int:
    """Taps of an ordinary convolution's kernel."""
    if consumer.moving or op_name(consumer.node) not in ("convolution", "_convolution") or consumer.node.args[6]:
        return 1
    weight: Any = consumer.node.args[1]
    return math.prod(spec(weight).shape[2:])
