"""Cuts of dims that are grids: whatever op runs along whichever dim, the small model is proved.

What stays of a value must be rectangular, and what an op mixes must be tied; where either is forgotten, the small
model computes something else, its sizes fit nowhere, or a kernel refuses them.
"""

from __future__ import annotations

import pytest
import torch
from grid_cases import LAYOUTS, OPS, Grid, dims

import surgeon
from surgeon.errors import BudgetError, SurgeonError

PLACES = [(layout, dim) for layout in LAYOUTS for dim in dims(layout)]
# every op on both dims of the plain grid, and on some others in turn: all pairs would take minutes
CHOSEN = {
    op: PLACES[:2] + PLACES[2 + number % 4 :: 4] for number, op in enumerate(OPS)
}  # fmt: skip

# nothing may leave: an index for every entry, or an op without a rule
WHOLE = {"gather", "aminmax", "renorm"}


def outcome(model: Grid, x: torch.Tensor, ratio: float, seed: int) -> str:
    """What came of one random cut."""
    try:
        plan = surgeon.inspect(model, x).plan(ratio, round_to=1, criterion="random", seed=seed)
        surgeon.verify(model, plan.apply(model), plan, x)
    except BudgetError as error:
        return "whole" if "everything that was found is frozen" in str(error) else str(error)
    except SurgeonError as error:
        return f"{type(error).__name__}: {error}"
    return "proved"


@pytest.mark.parametrize("op", OPS)
def test_any_op_on_any_dim_of_a_grid(op: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    for number, (layout, dim) in enumerate(CHOSEN[op]):
        model = Grid(layout, op, dim).eval()
        ratio = (0.25, 0.5)[number % 2]
        want = "whole" if op in WHOLE else "proved"
        assert outcome(model, x, ratio, seed=number) == want, f"{layout}, dim {dim}, ratio {ratio}"
