"""Inputs in objects and in layouts of their own."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, UserDict, deque
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError
from surgeon.graph.nests import map_tensors

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.x, self.note = x, "kept"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Pair(NamedTuple):
    x: Tensor
    rest: Any = None


class Deep:
    def __init__(self, x: Tensor) -> None:
        self.parts = {"first": [Plain(x)]}

    @property
    def x(self) -> Tensor:
        x: Tensor = self.parts["first"][0].x
        return x


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 32), nn.Linear(32, 4)

    def forward(self, data: Any) -> Tensor:
        x = data["x"] if hasattr(data, "keys") else data.x
        out: Tensor = self.b(self.a(x).relu())
        return out


@pytest.mark.parametrize(
    "kind", [Frozen, Plain, Slotted, Pair, Deep, lambda x: OrderedDict(x=x), lambda x: UserDict(x=x)]
)
def test_inputs_in_objects(kind: Any) -> None:
    given = kind(X)
    small = surgeon.shrink(Reads(), 0.5, example_inputs=(given,), round_to=1)
    assert small.a.out_features == 16
    assert (given["x"] if hasattr(given, "keys") else given.x) is X


def test_what_is_shared_stays_shared_and_the_rest_is_not_copied() -> None:
    plain, other = Plain(X), Plain(X)
    other.x = "no tensor"  # type: ignore[assignment]  # as it may be
    nest = [plain, plain, other, deque([X]), {1: X}]
    made = map_tensors(nest, lambda tensor: tensor + 1)
    assert made[0] is made[1] is not plain
    assert made[0].x is made[3][0] is made[4][1]
    assert made[2] is other
    assert plain.x is X
    held: list[Any] = [X]
    held.append(held)
    assert map_tensors(held, lambda tensor: tensor)[0] is X


def test_an_object_that_cannot_be_copied_is_refused() -> None:
    class Locked(Plain):
        def __copy__(self) -> Any:
            raise TypeError(f"holds a {type(threading.Lock()).__name__}")

    with pytest.raises(InputError, match="cannot be copied") as error:
        surgeon.inspect(Reads(), (Locked(X),))
    assert "Locked" in error.value.where


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        out: Tensor = self.c(adjacency @ self.b((adjacency @ self.a(x)).relu()).relu())
        return out


@pytest.mark.parametrize("layout", ["to_dense", "to_sparse_coo", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs(layout: str) -> None:
    adjacency = getattr(
        (torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.5).float(), layout
    )()
    small = surgeon.shrink(Graphs(), 0.5, example_inputs=(X, adjacency), round_to=1)
    assert (small.a.out_features, small.b.out_features) == (16, 16)


def test_nested_tensors_are_refused() -> None:
    ragged = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(2, 3)], layout=torch.jagged)
    with pytest.raises(InputError, match="nested tensor"):
        surgeon.inspect(nn.Linear(3, 4), (ragged,))
