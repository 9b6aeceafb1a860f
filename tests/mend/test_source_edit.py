"""Where a number may stand that must follow the widths: attributes of any kind, and the source of methods."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.graph import source_code
from surgeon.mend.methods import source_edit as sources

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers of width 16, and a view between them; torch.fx cannot trace it for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.flat(self.a(x if mask is None else x * mask)))

    def flat(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Body(Two):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, 16)


class Default(Two):
    def flat(self, x: Tensor, width: int = 16) -> Tensor:
        return x.view(-1, width)


class Keyword(Two):
    def flat(self, x: Tensor, *, rows: int = -1, width: int = 16) -> Tensor:
        return x.view(rows, width)


class Static(Two):
    @staticmethod
    def flat(x: Tensor) -> Tensor:  # type: ignore[override]  # called the same way
        return x.view(-1, 16)


class OfClass(Two):
    @classmethod
    def flat(cls, x: Tensor) -> Tensor:  # type: ignore[override]  # called the same way
        return x.view(-1, 16)


class Decorated(Two):
    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, 16) * 2


class Property(Two):
    @property
    def width(self) -> int:
        return 16

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, self.width)


class Private(Two):
    def __init__(self) -> None:
        super().__init__()
        self._width = 16

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, self._width)


class Shared(Two):
    width, sizes = 16, (1, 2)

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, self.width)


class SharedTuple(Two):
    sizes = (-1, 16)

    def flat(self, x: Tensor) -> Tensor:
        return x.view(self.sizes)


class Sized(Two):
    def __init__(self) -> None:
        super().__init__()
        self.size = torch.Size([4, 16])

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, *self.size[1:])


@dataclasses.dataclass(frozen=True)
class Options:
    width: int = 16


class Frozen(Two):
    def __init__(self) -> None:
        super().__init__()
        self.options = Options()

    def flat(self, x: Tensor) -> Tensor:
        return x.view(-1, self.options.width)


class Pair(NamedTuple):
    rows: int
    width: int


class Named(Two):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(-1, 16)

    def flat(self, x: Tensor) -> Tensor:
        return x.view(*self.pair)


PLACES = {
    Body: ("source", "flat:1"),
    Default: ("source", "flat:0"),
    Keyword: ("source", "flat:0"),
    Static: ("source", "flat:1"),
    OfClass: ("source", "flat:1"),
    Decorated: ("source", "flat:1"),
    Property: ("source", "width:0"),
    Private: ("attribute", "_width"),
    Shared: ("attribute", "width"),
    SharedTuple: ("attribute", "sizes.1"),
    Sized: ("attribute", "size.1"),
    Frozen: ("attribute", "options.width"),
    Named: ("attribute", "pair.1"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_number_is_changed_where_it_stands(kind: type[Two]) -> None:
    """In the small model alone, which passes it on to copies and through files."""
    torch.manual_seed(0)
    model = kind().eval()
    want = model(X)
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    assert [(edit.kind, edit.name, edit.old, edit.new) for edit in plan.edits] == [(*PLACES[kind], 16, 8)]
    assert torch.equal(model(X), want) and kind().flat(torch.ones(2, 16)).shape == (2, 16)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # our own file: what is tested is that it pickles
    for other in (copy.deepcopy(small), loaded):
        assert torch.equal(other(X), small(X))
        assert torch.equal(other(X, torch.zeros(6)), small(torch.zeros(4, 6)))


def test_what_is_around_a_method_stays() -> None:
    torch.manual_seed(0)
    small = surgeon.shrink(Decorated().eval(), 0.5, example_inputs=X, round_to=1)
    assert not small.flat(torch.ones(2, 8, requires_grad=True)).requires_grad
    method = vars(type(small))["flat"]
    assert method.__name__ == "flat" and method.__wrapped__.__wrapped__.__code__.co_name == "flat"
    assert "x.view(-1, 8) * 2" in inspect.getsource(method)


class Said:
    def numbers(self, x: int, y: int = 16) -> tuple[int, str]:
        """A text that begins
        at the margin, with 16."""
        return x * 0x10 + len("größer") * 16 + y, f"{x + 16} 16"


@pytest.mark.parametrize(
    ("which", "want"),
    [(0, (16 + 96 + 9, "17 16")), (1, (9 + 96 + 16, "17 16")), (2, (16 + 54 + 16, "17 16"))],
)
def test_numbers_stand_where_the_file_has_them(which: int, want: tuple[int, str]) -> None:
    """However they are written; the source then says what runs."""
    lines, first = inspect.getsourcelines(Said.numbers)
    found = [*source_code.numbers(Said.numbers)]
    assert found[:3] == [
        (0, (__file__, first), 16),
        (1, (__file__, first + 3), 16),
        (2, (__file__, first + 3), 16),
    ]
    changed = sources.changed(Said.numbers, which, 16, 9)
    assert changed(Said(), 1) == want
    again = sources.changed(changed, which, 9, 16)
    assert again(Said(), 1) == Said().numbers(1)
    old, new = [("y: int = 16", "y: int = 9"), ("0x10", "9"), ('") * 16', '") * 9')][which]
    assert inspect.getsource(changed) == "".join(lines).replace(old, new)
    with pytest.raises(ValueError, match=f"it is not number {which} of"):
        sources.changed(changed, which, 16, 7)
