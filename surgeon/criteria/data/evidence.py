"""Evidence: what a pass over data found, and which consumers speak for a group."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgeon.coupling.groups import Group
from surgeon.criteria.data.consumers import Consumer
from surgeon.criteria.data.curvature import Curvature
from surgeon.errors import InputError
from surgeon.graph.arguments import arguments
from surgeon.graph.messages import where
from surgeon.ops.ids import DimIds

_SAMPLES = 1024  # samples of which the mean of each channel is kept


class Gradients:
    """Sums over batches of one parameter's gradient g (of the batch's loss).

    Attributes:
        total, square: sums of g and of g^2, if asked for.
        gate, gate_square: by dim, sums of u and of u^2 where u is w * g summed over all other dims: how fast
            the loss changes when everything at one index is scaled.
    """

    def __init__(self, tensor: Tensor, whole: bool, dims: Collection[int]) -> None:
        self.tensor = tensor

        def zeros(shape: Any) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=tensor.device)

        self.whole, self.wanted = whole, whole or bool(dims)
        self.total, self.square = zeros(tensor.shape if whole else 0), zeros(tensor.shape if whole else 0)
        self.gate = {dim: zeros(tensor.shape[dim]) for dim in dims}
        self.gate_square = {dim: zeros(tensor.shape[dim]) for dim in dims}

    def add(self, gradient: Tensor | None) -> None:
        """One batch; None if the run did not use the parameter."""
        if gradient is None:
            return
        gradient = gradient.detach().double()
        if self.whole:
            self.total += gradient
            self.square += gradient.square()
        if self.gate:
            product = gradient * self.tensor.detach()
            for dim in self.gate:
                sensitivity = (
                    product.sum([d for d in range(product.dim()) if d != dim])
                    if product.dim() > 1
                    else product
                )
                self.gate[dim] += sensitivity
                self.gate_square[dim] += sensitivity.square()


class Statistics:
    """Sums over all batches of what one consumer reads; entries are [groups, width] (see `consumers`).

    Attributes:
        count: samples times positions. samples: number of samples.
        total, size, square: sums of x, |x| and x^2 of each entry.
        covariance: [groups, width, width], the sum of x x^T within a group, over samples and positions (of a
            convolution: shared by all taps of the kernel).
        weight_size, weight_square: sums of |w| and w^2 over all weights that multiply an entry; of weights
            that are data themselves, the sum over samples of the mean over all that multiply it in their
            batch.
        weight_product: the same sum of w w^T.
        means: mean of each entry in each sample, of the first samples only. ranks: sum of the ranks of its
            maps.
        sensitivity: sum over samples of |mean of x * gradient over the positions|.
        curvature: if asked for.
    """

    def __init__(self, consumer: Consumer, needs: Collection[str], widest: int) -> None:
        self.consumer, self.needs = consumer, needs
        groups, width = consumer.shape
        if "covariance" in needs and width > widest:
            raise InputError(
                f"criterion 'obs' would need a covariance of {width} x {width} channels",
                where=where(consumer.node),
                why=f"the limit is {widest}",
                fix=f"use criterion 'variance', or criteria.OBS(widest={width}) if memory allows",
            )
        self.count = self.samples = self.runs = self.kept = 0
        entries = torch.zeros(groups, width, dtype=torch.float64)
        self.total, self.size, self.square = entries, entries.clone(), entries.clone()
        self.weight_size, self.weight_square = entries.clone(), entries.clone()
        self.ranks, self.sensitivity = entries.clone(), entries.clone()
        square = (groups, width, width) if "covariance" in needs else (0,)
        self.covariance, self.weight_product = (torch.zeros(square, dtype=torch.float64) for _ in range(2))
        self.means: list[Tensor] = []
        self.curvature = Curvature(consumer, widest) if "curvature" in needs else None
        self.edges: list[Any] = []
        self._wanting: list[Callable[[Tensor], None]] = []

    def see(
        self, consumer: Consumer, samples: int, args: Mapping[str, Any], out: Any
    ) -> Callable[[], None] | None:
        """One run of the consumer on so many samples, as it stands in the run that the batch is held
        against.
        """
        data = args[consumer.data] if consumer.data else out[0] if isinstance(out, tuple | list) else out
        recorded = _spec_of(consumer)
        if data.dim() != len(recorded) or any(data.shape[d] != recorded[d] for d in consumer.channels):
            raise InputError(
                f"a batch gives {where(consumer.node)} an input of shape {tuple(data.shape)}, recorded was {recorded}",
                fix="pass batches like the example inputs",
            )
        if "activation_gradients" in self.needs and data.requires_grad:
            self._want(
                torch.autograd.graph.get_gradient_edge(data), partial(self._add_felt, consumer, data.detach())
            )
        with torch.no_grad():
            rows = consumer.rows(data.detach())
            if tuple(rows.shape[2:]) != self.consumer.shape:
                raise InputError(
                    f"a batch gives {where(consumer.node)} other matrices than the example inputs",
                    fix="pass batches of the size of the example inputs",
                )
            self._add(rows.double(), data.detach())
            if consumer.weight and (self.runs == 0 or consumer.moving) and self.needs_weights:
                self._add_weight(consumer.fan(args[consumer.weight].detach()).double(), len(rows))
        self.runs += 1
        if self.curvature is None:
            return None
        self.curvature.see(consumer, args)
        return partial(self._later, self.curvature, consumer, samples, args, out)

    def _later(
        self, curvature: Curvature, consumer: Consumer, samples: int, args: Mapping[str, Any], out: Any
    ) -> None:
        for edge, wants in curvature.wanted(consumer, samples, args, out):
            self._want(edge, wants)

    def _want(self, edge: Any, wants: Callable[[Tensor], None]) -> None:
        self.edges.append(edge)
        self._wanting.append(wants)

    def _add_felt(self, consumer: Consumer, data: Tensor, gradient: Tensor) -> None:
        self.sensitivity += consumer.rows((data * gradient).double()).mean(1).abs().sum(0).cpu()

    @property
    def needs_weights(self) -> bool:
        """Whether the rows are weighted by the norm of the output gradient."""
        return "moments" in self.needs or "covariance" in self.needs

    def _add(self, rows: Tensor, data: Tensor) -> None:
        samples, positions = rows.shape[:2]
        self.count += samples * positions
        self.samples += samples
        if "moments" in self.needs:
            self.total += rows.sum((0, 1)).cpu()
            self.size += rows.abs().sum((0, 1)).cpu()
        if self.needs_weights:
            self.square += rows.square().sum((0, 1)).cpu()
        if "covariance" in self.needs:
            flat = rows.flatten(0, 1).transpose(0, 1)  # [groups, rows, width]
            self.covariance += (flat.transpose(1, 2) @ flat).cpu()
        if "samples" in self.needs and self.kept < _SAMPLES:
            self.means.append(rows[: _SAMPLES - self.kept].mean(1).float().cpu())
            self.kept += len(self.means[-1])
        if "ranks" in self.needs and self.consumer.planes:
            work = data if data.dtype is torch.float64 else data.float()
            self.ranks += torch.linalg.matrix_rank(work).sum(0).double().cpu().reshape(self.ranks.shape)

    def _add_weight(self, fan: Tensor, samples: int) -> None:
        share = fan.shape[-1] / samples if self.consumer.moving else 1
        self.weight_size += fan.abs().sum(-1).cpu() / share
        self.weight_square += fan.square().sum(-1).cpu() / share
        if "covariance" in self.needs:
            self.weight_product += (fan @ fan.transpose(1, 2)).cpu() / share

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Add what the gradients of one backward pass say, in the order in which they were asked for."""
        for wants, gradient in zip(self._wanting, gradients, strict=True):
            if gradient is not None:
                wants(gradient)
        self.edges.clear()
        self._wanting.clear()

    def check(self, label: str) -> None:
        """Refuse activations that are not finite.

        Raises:
            InputError: a batch gives NaN or infinite activations.
        """
        if not bool(torch.isfinite(self.square).all()):
            raise InputError(
                f"{label} gives activations that are NaN or infinite",
                where=where(self.consumer.node),
                fix="leave this batch out, or look for what overflows in the model",
            )

    @property
    def weight_share(self) -> int:
        """What the sums over weights are to be divided by."""
        return self.samples if self.consumer.moving else 1


def _spec_of(consumer: Consumer) -> tuple[int, ...]:
    node: Any = arguments(consumer.node)[consumer.data] if consumer.data else consumer.node
    found = node.meta["spec"]
    shape: tuple[int, ...] = (found[0] if isinstance(found, tuple) else found).shape
    return shape


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one consumer says of a group: entry `entry[i]` of its [groups * width] leaves with unit
    `unit[i]`.
    """

    statistics: Statistics
    entry: DimIds
    unit: DimIds

    def sum(self, values: Tensor, units: int) -> DimIds:
        """Values [groups, width] summed by unit."""
        found: DimIds = np.bincount(self.unit, weights=values.numpy().ravel()[self.entry], minlength=units)
        return found

    def mean(self, values: Tensor, units: int) -> DimIds:
        """The mean of `values` over the entries of each unit."""
        found: DimIds = self.sum(values, units) / np.maximum(np.bincount(self.unit, minlength=units), 1)
        return found


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a pass over `batches` batches found: by parameter, and by consumer."""

    batches: int
    gradients: Mapping[str, Gradients]
    statistics: Sequence[Statistics]

    @cached_property
    def _by_atom(self) -> dict[int, list[int]]:
        found = defaultdict(list)
        for number, item in enumerate(self.statistics):
            atoms = np.concatenate([a.ravel() for a in item.consumer.atoms])
            for atom in np.unique(atoms[atoms >= 0]).tolist():
                found[atom].append(number)
        return dict(found)

    def of(self, group: Group) -> list[Reading]:
        """The consumers that read a group's channels; products of data with data only for units that no other
        reads.
        """
        sets = group.sets.ravel()
        numbers = sorted({number for atom in sets.tolist() for number in self._by_atom.get(atom, [])})
        readings = [_reading(self.statistics[number], sets) for number in numbers]
        plain = [r for r in readings if not r.statistics.consumer.moving]
        told = np.zeros(group.units, dtype=bool)
        for reading in plain:
            told[reading.unit] = True
        rest = []
        for reading in readings:
            new = ~told[reading.unit]
            if reading.statistics.consumer.moving and new.any():
                rest.append(Reading(reading.statistics, reading.entry[new], reading.unit[new]))
        return plain + rest


def _reading(statistics: Statistics, sets: DimIds) -> Reading:
    order = np.argsort(sets)
    entries, units = [], []
    for atoms in statistics.consumer.atoms:
        flat = atoms.ravel()
        place = np.minimum(np.searchsorted(sets[order], flat), len(sets) - 1)
        hit = np.flatnonzero(sets[order][place] == flat)
        entries.append(hit)
        units.append(order[place[hit]])
    pairs = np.unique(
        np.stack([np.concatenate(entries), np.concatenate(units)]), axis=1
    )  # once, by however many arrays of ids
    return Reading(statistics, pairs[0], pairs[1])
