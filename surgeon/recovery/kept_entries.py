"""Narrow: the part of the original's values that the small model still has."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from surgeon.coupling.propagate import Propagation, propagate
from surgeon.coupling.solve import solve
from surgeon.cut.plan import Plan
from surgeon.errors import PlanError
from surgeon.graph.graph import Graph
from surgeon.ops.ids import DimIds
from surgeon.selection.cost import ShapeModel


class KeptEntries:
    """Which entries of each value of the original's run stay under a plan.

    Raises:
        PlanError: the plan removes what no choice of channels of this run removes.
    """

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.propagation: Propagation = propagate(graph)
        self.shapes = ShapeModel(graph, self.propagation, solve(self.propagation.constraints))
        self.choice = self.shapes.chosen(plan.kept)
        here = {name for name, _ in self.propagation.slots}
        if self.shapes.kept(self.choice) != {name: dims for name, dims in plan.kept.items() if name in here}:
            raise PlanError(
                "the plan removes other channels than this model's run ties together",
                fix="pass the plan that made the small model, and batches like the example inputs that it was made with",
            )

    def __call__(self, node: fx.Node, value: Tensor) -> Tensor:
        """What stays of a node's value; the node is of the run that was propagated, the value may be of any
        batch.
        """
        axes = self.propagation.axes.get(node, {})
        axes = axes[0] if isinstance(axes, tuple) else axes
        gone = {
            dim: leaves
            for dim, track in axes.items()
            if (leaves := self.shapes.leaves(track, self.choice)).any()
        }
        if all(axes[dim].size == axes[dim].shape[dim] for dim in gone):
            for dim, leaves in gone.items():
                value = value.index_select(dim, torch.from_numpy(np.flatnonzero(~leaves)).to(value.device))
            return value
        stays = torch.from_numpy(~functools.reduce(np.logical_or, gone.values())).to(
            value.device
        )  # dims of each head, say
        return value[stays.expand(value.shape)].reshape(self._sizes(node, axes, value))

    def dims(self, node: fx.Node) -> set[int]:
        """The dims of a node's value along which something may have left."""
        axes = self.propagation.axes.get(node, {})
        return set(axes[0] if isinstance(axes, tuple) else axes)

    def slot(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """What stays of one of the original's tensors along one dim."""
        ids = self.propagation.slots.get((name, dim))
        if ids is None:
            return tensor
        stays = np.flatnonzero(~self.shapes.leaves(ids, self.choice))
        return tensor.index_select(dim, torch.from_numpy(stays).to(tensor.device))

    def _sizes(self, node: fx.Node, axes: Mapping[int, DimIds], value: Tensor) -> tuple[int, ...]:
        small = self.shapes.shape(node, self.choice)
        return tuple(small[d] if d in axes else n for d, n in enumerate(value.shape))
