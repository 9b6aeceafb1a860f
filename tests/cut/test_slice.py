"""What a plan says of tensors with several names."""

from __future__ import annotations

import pytest
from torch import nn

from surgeon.cut.slice import find_cuts
from surgeon.errors import PlanError


def test_a_tied_tensor_is_cut_in_one_way() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    model["b"].weight = model["a"].weight
    (tensor, cut) = find_cuts(model, {"a.weight": {0: [0, 1]}, "b.weight": {1: [2]}})[id(model["a"].weight)]
    assert tensor is model["a"].weight and cut == {0: [0, 1], 1: [2]}
    same = {"a.weight": {0: [0, 1]}, "b.weight": {0: [0, 1]}}
    assert find_cuts(model, same)[id(model["a"].weight)][1] == {0: [0, 1]}
    with pytest.raises(PlanError, match="cut in different ways"):
        find_cuts(model, {**same, "b.weight": {0: [0, 2]}})
    with pytest.raises(PlanError, match=r"no tensor 'c\.weight'"):
        find_cuts(model, {"c.weight": {0: [0]}})
