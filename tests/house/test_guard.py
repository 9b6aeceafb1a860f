"""The guard of the speed tables reads the committed ones, and sees a ratio that dropped."""

from __future__ import annotations

import re

import pytest

from benchmarks.lib.results import RESULTS
from benchmarks.speed.guard import GUARDED, ratios, worse

TABLE = """# Title

| model | MACs | speed-up | other |
| --- | ---: | ---: | ---: |
| a | 50% | 2.00 [1.9, 2.1] | 1.00 |
| a | 25% | 3.00 [2.9, 3.1] | 9.99 |
| b | 25% | fails: error | 9.99 |

| model | speed-up |
| c | 5.00 |
"""


def test_it_reads_the_first_table() -> None:
    assert ratios(TABLE, ("speed-up",)) == {("a, 50%", "speed-up"): 2.0, ("a, 25%", "speed-up"): 3.0}
    with pytest.raises(ValueError, match="no column 'slow-down'"):
        ratios(TABLE, ("slow-down",))


def test_a_ratio_that_drops_is_seen() -> None:
    before = ratios(TABLE, ("speed-up",))
    assert worse(before, ratios(TABLE.replace("2.00 [", "1.71 ["), ("speed-up",))) == []
    slower = ratios(TABLE.replace("2.00 [", "1.69 ["), ("speed-up",))
    assert worse(before, slower) == [(("a, 50%", "speed-up"), 2.0, 1.69)]
    gone = ratios(re.sub(r"\| a \| 25%.*\n", "", TABLE), ("speed-up",))
    assert [key for key, *_ in worse(before, gone)] == [("a, 25%", "speed-up")]


@pytest.mark.parametrize("name", GUARDED)
def test_the_committed_tables_have_the_columns(name: str) -> None:
    columns = GUARDED[name].columns
    found = ratios((RESULTS / f"{name}.md").read_text(), columns)
    assert {column for _, column in found} == set(columns) and len(found) >= 10
