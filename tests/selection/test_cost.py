"""Which entries leave under a choice: as the solution says, whichever ids were chosen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.coupling.propagate import propagate
from surgeon.coupling.solve import solve
from surgeon.selection.cost import ShapeModel, nothing


class GridBesideChannels(nn.Module):
    """Of what the last layer reads, some entries leave with a row or a column, others alone."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.plain, self.last = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.grid(x).view(-1, 2, 4).softmax(-1).flatten(1)
        return self.last(torch.cat([rows, self.plain(x)], 1))


def test_each_id_takes_its_own_entries_along() -> None:
    graph = capture(GridBesideChannels().eval(), torch.randn(5, 6))
    propagation = propagate(graph)
    solution = solve(propagation.constraints)
    shapes = ShapeModel(graph, propagation, solution)
    slot = propagation.slots["last.weight", 1]
    read = np.unique(np.concatenate([atoms[atoms >= 0] for atoms in solution.atoms(slot)]))
    assert len(solution.atoms(slot)) > 1 and any((atoms < 0).any() for atoms in solution.atoms(slot))
    for number in (*read.tolist(), len(solution.root) - 1):
        choice = nothing(solution)
        choice[number] = True
        assert (shapes.leaves(slot, choice) == solution.leaves(slot, choice)).all()
        assert shapes.leaves(slot, choice).any() == (number in read)
