"""What an op computes of one operand, as a scale and a shift: the same as the op itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.graph.arguments import Arguments
from surgeon.ops.families.elementwise import affine

ATEN = torch.ops.aten
X, Y = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 1
OPS = {
    "mul": (ATEN.mul.Tensor, {}),
    "div": (ATEN.div.Tensor, {}),
    "add": (ATEN.add.Tensor, {"alpha": 3}),
    "sub": (ATEN.sub.Tensor, {"alpha": 3}),
    "rsub": (ATEN.rsub.Tensor, {"alpha": 3}),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_scale_and_shift(name: str, first: bool) -> None:
    op, options = OPS[name]
    given: dict[str, Any] = dict(Arguments(op, (None, Y) if first else (Y, None), options))
    form = affine(name, given)
    if name == "div" and not first:
        assert form is None
        return
    assert form is not None
    torch.testing.assert_close(form[0] * X + form[1], op(*((X, Y) if first else (Y, X)), **options))


def test_a_rounded_quotient_is_none() -> None:
    given = dict(Arguments(ATEN.div.Tensor_mode, (None, Y), {"rounding_mode": "floor"}))
    assert affine("div", given) is None
