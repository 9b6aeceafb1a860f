"""What the framework keeps for every rule: ids that fit, rows that lose equally many, mixing that joins."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.coupling.propagate import Propagation, propagate
from surgeon.coupling.solve import solve
from surgeon.errors import RuleError
from surgeon.ops import table
from surgeon.ops.context import OpContext
from surgeon.ops.ids import Constraints
from surgeon.ops.invariants import acyclic, joined_along
from surgeon.ops.table import Family, OpInfo


class Wave(nn.Module):
    """One op whose rule the tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.a * x)


def with_rule(monkeypatch: pytest.MonkeyPatch, rule: Any) -> Propagation:
    monkeypatch.setitem(table._OPS, "sin", OpInfo(Family.ELEMENTWISE, ids=rule))
    graph = capture(Wave(), torch.ones(()))
    return propagate(dataclasses.replace(graph, outputs=()))


@pytest.mark.parametrize(
    "rule",
    [
        lambda ctx: {0: ctx.constraints.new(4)},  # too few dims
        lambda ctx: {1: ctx.constraints.new((1, 4))},  # as many ids as another dim has
        lambda ctx: {2: ctx.constraints.new((1, 1, 6))},  # a dim that the result does not have
        lambda ctx: {0: ctx.constraints.new((4, 3))},  # rows that the result does not have
        lambda ctx: ({}, {}),  # two results
    ],
)
def test_ids_that_do_not_fit_the_result_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    with pytest.raises(RuleError, match=r"rule of op aten\.sin"):
        with_rule(monkeypatch, rule)


def test_rows_lose_equally_many_whatever_the_rule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that gives each row ids of its own, and says nothing of how many must stay."""
    found = with_rule(monkeypatch, lambda ctx: {1: ctx.constraints.new((4, 6))})
    assert [b.matrix.shape for b in found.constraints.balances] == [(4, 6)]


def test_a_row_that_is_frozen_holds_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(ctx: OpContext) -> Any:
        ids = ctx.constraints.new((4, 6))
        ctx.constraints.freeze(ids[2], "a row that may not lose anything")
        return {1: ids}

    found = with_rule(monkeypatch, rule)
    (balance,) = found.constraints.balances
    solution = solve(found.constraints)
    assert solution.frozen[solution.root[balance.matrix]].all()


def test_mixing_joins_the_other_dims_across_it() -> None:
    """4 x 8 with ids of their own in each row: an op along dim 0 makes one column of each."""
    constraints = Constraints()
    rows, columns = constraints.new((4, 1)), constraints.new((4, 8))
    axes = joined_along(constraints, {0: rows, 1: columns}, [0])
    assert axes[0] is rows
    assert axes[1].shape == (1, 8)
    root = solve(constraints).root
    assert (root[columns] == root[columns[:1]]).all()
    assert len(np.unique(root[columns])) == 8
    same = joined_along(Constraints(), {0: rows, 1: columns}, [1])
    assert same[1] is columns


def test_dims_do_not_vary_along_each_other() -> None:
    """Ids of the rows that differ by column, and of the columns that differ by row: nothing rectangular could stay."""
    constraints = Constraints()
    axes = {0: constraints.new((3, 5)), 1: constraints.new((3, 5))}
    settled = acyclic(constraints, axes)
    assert settled[0].shape == (3, 1)
    assert settled[1] is axes[1]


def test_a_longer_cycle_of_dims_is_broken() -> None:
    constraints = Constraints()
    axes = {
        0: constraints.new((2, 3, 1)), 1: constraints.new((1, 3, 4)), 2: constraints.new((2, 1, 4)),
    }  # fmt: skip
    settled = acyclic(constraints, axes)
    assert settled[0].shape == (2, 1, 1)
    assert [settled[d].shape for d in (1, 2)] == [(1, 3, 4), (2, 1, 4)]


def test_a_grid_beside_a_turned_one_is_rectangular() -> None:
    """Two grids, one turned, one above the other: each dim's ids vary along the other dim in one half."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(self.a * x).view(4, 8), (self.b * x).view(8, 4).t()], 0)

    found = propagate(dataclasses.replace(capture(Beside(), torch.ones(())), outputs=()))
    (axes,) = [found.axes[node] for node in found.axes if str(node.target).startswith("aten.cat")]
    assert not (axes[0].shape[1] > 1 and axes[1].shape[0] > 1)


def test_a_reduction_must_say_along_which_dims_it_mixes() -> None:
    with pytest.raises(ValueError, match="along which dims do unheard_of mix"):
        table.op("unheard_of", Family.REDUCTION)
