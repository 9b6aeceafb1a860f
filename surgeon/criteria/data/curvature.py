"""Curvature: what a consumer's results would lose if weights changed, and how much the model's outputs hang
on them.

Two factors, as in K-FAC (Martens and Grosse, 2015): the covariance of what is read, and the squares of the
gradients of what is given. They take positions for independent, and gradients for independent of what is
read. Where features are pooled, or few samples switch a channel on and only their outputs read it, both are
wrong by far; so what the loss of one entry does is measured without factors, too (`alone`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgeon.criteria.data.consumers import Consumer
from surgeon.criteria.data.windows import Layout
from surgeon.errors import InputError
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import spec
from surgeon.graph.messages import where
from surgeon.ops.table import product

# entries with which the taps of a convolution are entries of their own; beyond, they share one covariance
MOST = 1200
_PLACES = 1024  # places of a batch that are looked at, if patches are

Later = Callable[[], None]
Gradient = tuple[Any, Callable[[Tensor], None]]  # an edge of autograd's, and who wants its gradient


class Curvature:
    """Sums over all batches.

    Attributes:
        taps: entries of the covariance for each entry of the consumer: a convolution's taps, or 1 where they
            share.
        covariance: [groups, width * taps, width * taps], sum of x x^T over `count` rows. total: [groups,
            width * taps], of x.
        weight: [groups, width * taps, outputs]; None for products of data with data.
        sensitivity: [groups, outputs], sum over samples and positions of the squared gradient of each result.
        moments: [3, groups, width], sums over samples of u^2, u v and v^2, where u and v are the sums over a
            sample's positions of x * gradient and of the gradient of each entry, by this consumer alone (of
            products of data with data: by all).
        mean: [groups, width], of x over samples and positions.
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
        entries = 0 if consumer.moving else width * self.taps
        self.covariance = torch.zeros(groups, entries, entries, dtype=torch.float64)
        self.total = torch.zeros(groups, entries, dtype=torch.float64)
        self.weight: Tensor | None = None
        self.sensitivity = torch.zeros((), dtype=torch.float64)
        self.moments = torch.zeros(3, groups, width, dtype=torch.float64)
        self._sum, self._places = torch.zeros(groups, width, dtype=torch.float64), 0
        self._generator = torch.Generator().manual_seed(0)

    def see(self, consumer: Consumer, args: Mapping[str, Any]) -> None:
        """What one run of the consumer reads."""
        if consumer.moving:
            return
        data, weight = args[consumer.data].detach(), args[consumer.weight].detach()
        rows = self._rows(consumer, data, weight).double()  # [groups, rows, entries]
        self.covariance += (rows.transpose(1, 2) @ rows).cpu()
        self.total += rows.sum(1).cpu()
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

    def wanted(self, consumer: Consumer, samples: int, args: Mapping[str, Any], out: Any) -> list[Gradient]:
        """The gradients to ask for, once autograd knows the result of a run on so many samples."""
        data = args[consumer.data]
        if consumer.moving:
            add = partial(self._add_moments, consumer, samples, data.detach())
            return [(torch.autograd.graph.get_gradient_edge(data), add)] if data.requires_grad else []
        known = isinstance(out, Tensor) and out.requires_grad
        return (
            [(torch.autograd.graph.get_gradient_edge(out), partial(self._feel, consumer, samples, args))]
            if known
            else []
        )

    def _feel(self, consumer: Consumer, samples: int, args: Mapping[str, Any], gradient: Tensor) -> None:
        assert self.weight is not None
        groups, _, outputs = self.weight.shape
        kept = self.consumer.outputs
        found = gradient.double().square()
        found = found.sum([d for d in range(found.dim()) if d not in kept]).cpu().flatten()
        if found.numel() % groups or outputs % (
            found.numel() // groups
        ):  # results that no column of the weight stands for
            found = found.mean().expand(groups, outputs)
        else:
            found = found.reshape(groups, -1).repeat_interleave(outputs * groups // found.numel(), 1)
        self.sensitivity = self.sensitivity + found
        data = args[consumer.data].detach()
        self._add_moments(consumer, samples, data, _pulled_back(consumer, args, gradient))

    def _add_moments(self, consumer: Consumer, samples: int, data: Tensor, gradient: Tensor) -> None:
        u, v = (_by_sample(consumer.rows(values.double()), samples) for values in (data * gradient, gradient))
        self.moments += torch.stack([u * u, u * v, v * v]).sum(1).cpu()
        rows = consumer.rows(data).double()
        self._sum += rows.sum((0, 1)).cpu()
        self._places += rows.shape[0] * rows.shape[1]

    @property
    def mean(self) -> Tensor:
        """[groups, width]: the mean of each entry that is read, over all places."""
        return self._sum / max(self._places, 1)

    @property
    def hessian(self) -> Tensor:
        """[groups, entries, entries]: E x x^T, less the mean's part if a constant can make up for it."""
        count = max(self.count, 1)
        mean = self.total / count
        held = mean[:, :, None] * mean[:, None] if self.consumer.constant else 0.0
        return self.covariance / count - held

    @property
    def error(self) -> Tensor:
        """W G W^T, [groups, entries, entries]: how the squared change of the outputs grows with that of the
        weights.
        """
        assert self.weight is not None
        sensitivity = self.sensitivity.expand(
            self.weight.shape[0], self.weight.shape[2]
        )  # 0 of a result that the outputs do not hang on
        return (self.weight * sensitivity[:, None]) @ self.weight.transpose(1, 2)

    @property
    def alone(self) -> Tensor:
        """[groups, width]: what the outputs lose to first order, squared and summed over the samples, if one
        entry is its mean everywhere, or zero where no constant can make up for the mean."""
        square, cross, constant = self.moments.unbind()
        if self.consumer.moving or not self.consumer.constant:
            return square
        return (square - 2 * self.mean * cross + self.mean.square() * constant).clamp(min=0.0)

    @property
    def estimated(self) -> Tensor:
        """The same as `alone` by the two factors."""
        parts = [
            m.unflatten(1, (-1, self.taps)).unflatten(3, (-1, self.taps)) for m in (self.hessian, self.error)
        ]
        found: Tensor = math.prod(
            part.diagonal(dim1=1, dim2=3) for part in parts
        )  # [groups, taps, taps, width]
        return found.sum((1, 2))


def _pulled_back(consumer: Consumer, args: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """The gradient of what a consumer read from that of its result, as if nothing else had read it."""
    read = args[consumer.data].detach().requires_grad_()
    given = {name: a.detach() if isinstance(a, Tensor) else a for name, a in args.items()}
    with torch.enable_grad():
        out = consumer.node.target(**{**given, consumer.data: read})  # type: ignore[operator]  # an op
        found: Tensor = torch.autograd.grad(out, read, gradient)[0]
    return found


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """Rows [n, positions, ...] summed to [samples, ...]: a batch flattened for the product holds them one
    after the other. Where the number tells that it holds other things, each row is a sample."""
    if len(rows) % samples == 0:
        rows = rows.reshape(samples, -1, *rows.shape[2:])
    return rows.sum(1)


def _taps(consumer: Consumer) -> int:
    """Taps of an ordinary convolution's kernel."""
    given, products = arguments(consumer.node), product(consumer.node)
    if consumer.moving or products is None or not products.windows or given["transposed"]:
        return 1
    return math.prod(spec(given[consumer.weight]).shape[2:])
