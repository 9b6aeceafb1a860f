"""Conclusions from facts about ids, and the worked examples of the code that draws them."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

from surgeon.coupling.solution import Solution
from surgeon.coupling.solve import solve
from surgeon.ops.ids import Constraints, DimIds


def grid() -> tuple[Constraints, DimIds, DimIds, DimIds]:
    """Six channels, seen as 2 x 3, all of them read: (facts, channels, rows, columns)."""
    constraints = Constraints()
    channels = constraints.new(6)
    axes = constraints.split(channels.reshape(2, 3), (0, 1))
    constraints.read({0: channels, **axes})
    return constraints, channels.reshape(2, 3), axes[0], axes[1]


def frozen(solution: Solution, which: DimIds) -> list[bool]:
    return solution.frozen[solution.root[which]].ravel().tolist()


def test_nothing_is_frozen_without_a_reason() -> None:
    constraints, channels, rows, columns = grid()
    solution = solve(constraints)
    assert not solution.frozen.any()
    assert (solution.row[channels] == rows).all()
    assert (solution.column[channels] == columns).all()


def test_a_frozen_cell_holds_its_row_and_its_column() -> None:
    """Else the row could leave, and take along a cell that may not."""
    constraints, channels, rows, columns = grid()
    constraints.freeze(channels[1, 1:2], "is read elsewhere")
    solution = solve(constraints)
    assert frozen(solution, rows) == [False, True]
    assert frozen(solution, columns)[3:] == [False, True, False]


def test_a_frozen_row_and_a_frozen_column_hold_their_cell() -> None:
    constraints, channels, rows, columns = grid()
    constraints.freeze(rows[0], "a row that stays")
    constraints.freeze(columns[0, 2:], "a column that stays")
    solution = solve(constraints)
    assert frozen(solution, channels) == [False, False, True, False, False, False]


def test_a_row_that_may_lose_nothing_holds_the_rows_that_keep_as_many() -> None:
    """Of 2 x 3, all columns of one row are frozen: the other row cannot lose any, either."""
    constraints, _, rows, columns = grid()
    constraints.freeze(columns[0], "columns that stay")
    solution = solve(constraints)
    assert frozen(solution, columns) == [True] * 6
    assert frozen(solution, rows) == [False, False]


def test_rows_that_may_both_lose_something_stay_free() -> None:
    constraints, _, _, columns = grid()
    constraints.freeze(columns[0, :2], "columns that stay")
    assert frozen(solve(constraints), columns) == [True, True, False, False, False, False]


def test_the_only_class_of_a_dim_stays() -> None:
    constraints = Constraints()
    channels = constraints.new(4)
    constraints.read({0: channels})
    constraints.value({0: channels})
    constraints.join(channels, np.broadcast_to(channels[:1], 4))
    solution = solve(constraints)
    assert frozen(solution, channels) == [True] * 4
    assert solution.why(channels)[0] == "would leave nothing of a tensor that the model computes with"


def test_what_no_op_reads_stays() -> None:
    constraints = Constraints()
    channels = constraints.new(4)
    constraints.read({0: channels[:3]})
    solution = solve(constraints)
    assert frozen(solution, channels) == [False, False, False, True]


def test_padding_that_is_summed_over_stays() -> None:
    """It matters how many there are, and no weight would show which of them left."""
    constraints = Constraints()
    channels, padding = constraints.new(3), constraints.new(2)
    constraints.mark_unowned(padding)
    both = np.concatenate([channels, padding])
    constraints.read({0: both})
    constraints.reduced(both)
    assert frozen(solve(constraints), both) == [False, False, False, True, True]


@pytest.mark.parametrize("module", ["ops.ids.constraints", "ops.families.moves.reshape", "coupling.solve"])
def test_worked_examples(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"surgeon.{module}"))
    assert tried >= 3
    assert failed == 0


def test_a_part_and_the_rest_that_are_no_multiples_keep_the_same_share() -> None:
    """Four of ten entries and the other six: each row of the balance names its ids as often as makes both equally long."""
    constraints = Constraints()
    ids = constraints.new(10)
    constraints.read({0: ids})
    constraints.share(ids[:4], ids)
    ((matrix, _),) = solve(constraints).balances
    assert [np.unique(row, return_counts=True)[1].tolist() for row in matrix] == [[3] * 4, [2] * 6]
