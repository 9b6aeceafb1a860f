"""The table of op cases, checked symbolically and by execution, both ways.

Symbolically: exactly the groups of the table are found. By execution: whatever a group lets go, the op on the
smaller operands gives what the op on the masked operands gives (ties that must be there); and when one slot
of a unit keeps what the others lose, the op fails or gives something else (ties that must not be missing are
not there for nothing).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn

from surgeon.capture.capture import capture
from surgeon.coupling.frozen import find_frozen
from surgeon.coupling.groups import Group, find_groups
from surgeon.coupling.propagate import Propagation, propagate
from surgeon.coupling.solution import Solution
from surgeon.coupling.solve import solve
from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.graph import Graph
from surgeon.mend.checking.expected_sizes import wanted
from surgeon.ops import masks
from surgeon.ops.ids import Constraints
from surgeon.ops.table import known
from surgeon.proof.reference import Reference
from surgeon.selection.cost import ShapeModel, nothing

EACH = pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)


class Op(nn.Module):
    """One op on parameters times the input, so that every dim of every operand is a slot."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.run = case.run
        for name, shape in zip("abc", case.shapes, strict=False):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Any:
        return self.run(
            *[getattr(self, name) * x for name in "abc" if hasattr(self, name)]
        )  # what meets no input stays


@dataclasses.dataclass
class Found:
    model: nn.Module
    graph: Graph
    propagation: Propagation
    solution: Solution
    groups: list[Group]


def analyse(case: Case) -> Found:
    return analysed(Op(case))


def analysed(model: nn.Module) -> Found:
    graph = capture(model, torch.ones(()))
    propagation = propagate(
        dataclasses.replace(graph, outputs=())
    )  # outputs stay free: the op alone is looked at
    solution = solve(propagation.constraints)
    return Found(model, graph, propagation, solution, find_groups(propagation, solution)[0])


def said(group: Group, case: Case) -> str:
    slots = sorted({f"{t}{d}" for t, d in group.slots})
    size = min(case.shapes["abc".index(s[0])][int(s[1])] for s in slots)
    text = "=".join(slots) + ("" if group.kind == "channels" else f".{group.kind}")
    sets = f"x{len(group.sets)}" if len(group.sets) > 1 else ""
    largest = max(case.shapes["abc".index(s[0])][int(s[1])] for s in slots)
    return text + (f"/{group.steps}" if group.steps != size or largest != size else "") + sets


@EACH
def test_ties_are_those_of_the_table(case: Case) -> None:
    found = analyse(case)

    def plain(text: str) -> str:
        return re.sub(r"/\d+", "", text) if "/" not in case.ties else text

    assert sorted(plain(said(g, case)) for g in found.groups) == sorted(case.ties.split())


def run_small(found: Found, kept: dict[str, dict[int, list[int]]], choice: Any) -> Tensor:
    """The recorded op on sliced operands, with the sizes that the cut asks for."""
    shapes = ShapeModel(found.graph, found.propagation, found.solution)
    values: dict[Any, Any] = {}
    for node in found.graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = torch.ones(())
        elif node.op == "get_attr":
            tensor = found.graph.tensors[str(node.target)].detach()
            for dim, index in kept.get(str(node.target), {}).items():
                tensor = tensor.index_select(dim, torch.tensor(index))
            values[node] = tensor
        elif node.op == "call_function":
            args = list(node.args)
            for position, value in wanted(node, shapes, choice).items():
                args[position] = value
            look = lambda item: torch.fx.node.map_arg(item, lambda n: values[n])  # noqa: E731  # shorter than a def here
            guard(str(node.target), [values[a] for a in node.args if isinstance(a, torch.fx.Node)], args)
            values[node] = node.target(*look(tuple(args)), **look(node.kwargs))  # type: ignore[operator]
    return values[found.graph.outputs[0][1]]


def guard(name: str, tensors: list[Tensor], args: list[Any]) -> None:
    """Some of torch's kernels divide by zero where sizes do not fit, and take the process along."""
    if "batch_norm" in name or "group_norm" in name:
        channels = tensors[0].shape[1]
        if any(t.numel() != channels for t in tensors[1:]) or (
            "group_norm" in name and (channels != args[4] or channels % args[6])
        ):
            raise RuntimeError("sizes of a norm do not fit")
    if "attention" in name:
        q, k, v = (t.shape for t in tensors[:3])
        if not k[1] or q[1] % k[1] or k[:3] != v[:3] or q[3] != k[3]:
            raise RuntimeError("sizes of an attention do not fit")
    if "convolution" in name:
        x, weight, groups = tensors[0], tensors[1], args[8]
        inputs = weight.shape[0] if args[6] else weight.shape[1] * groups
        if not groups or weight.shape[0] % groups or x.shape[1] != inputs:
            raise RuntimeError("sizes of a convolution do not fit")


def reference(found: Found, kept: dict[str, dict[int, list[int]]]) -> Tensor:
    plan = Plan(kept, found.graph.hash, 0, 0, 0, 0, ())
    ((_, (data, mask)),) = Reference(found.model, found.graph, plan, {}, {}).run((torch.ones(()),), {})
    return data[masks.full(mask, data.shape)] if mask else data.flatten()


def removal(found: Found, group: Group, seed: int) -> Any:
    """One step of the group, with a random unit of each balanced set."""
    random = np.random.default_rng(seed)
    choice = nothing(found.solution)
    for one_set in group.sets:
        choice[one_set[random.integers(len(one_set))]] = True
    return choice


@EACH
def test_what_a_group_lets_go_may_go(case: Case) -> None:
    check_removals(analyse(case))


def check_removals(found: Found) -> None:
    """One step of each group, three ways: the op on what is left gives what the whole one gives of it."""
    shapes = ShapeModel(found.graph, found.propagation, found.solution)
    for group in found.groups:
        for seed in range(3):
            choice = removal(found, group, seed)
            kept = shapes.kept(choice)
            small = run_small(found, kept, choice)
            want = reference(found, kept)
            assert small.numel() == want.numel()
            assert small.shape == shapes.shape(found.graph.outputs[0][1], choice)
            torch.testing.assert_close(
                small.flatten().double(), want.double(), rtol=1e-12, atol=1e-12, equal_nan=True
            )


class MergedOp(nn.Module):
    """The same op on operands two of whose dims are one dim of a slot: it sees a grid."""

    def __init__(self, case: Case, place: int) -> None:
        super().__init__()
        plain = Op(case)
        self.run, self.place, self.shapes = case.run, place, case.shapes
        for name in "abc"[: len(case.shapes)]:
            setattr(self, name, nn.Parameter(self._merged(getattr(plain, name).detach())))

    def _merged(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(self.place, self.place + 1) if tensor.dim() > self.place + 1 else tensor

    def forward(self, x: Tensor) -> Any:
        return self.run(
            *[getattr(self, name).view(shape) * x for name, shape in zip("abc", self.shapes, strict=False)]
        )


PLACED = [
    (case, place)
    for case in CASES
    for place in range(3)
    if any(len(shape) > place + 1 for shape in case.shapes)
]


@pytest.mark.parametrize(("case", "place"), PLACED, ids=lambda item: getattr(item, "op", item))
def test_what_a_group_lets_go_of_a_grid_may_go(case: Case, place: int) -> None:
    """The rows above, on views: what an op does to ids holds for grids as for dims of their own."""
    found = analysed(MergedOp(case, place))
    check_removals(found)


@EACH
def test_no_tie_is_missing_or_idle(case: Case) -> None:
    """Leaving one slot of a unit whole must break the op, for some unit: else the tie would be there for
    nothing.
    """
    found = analyse(case)
    shapes = ShapeModel(found.graph, found.propagation, found.solution)
    for group in found.groups:
        choices = [removal(found, group, seed) for seed in range(4)]
        for name, dim in group.slots if len(group.slots) > 1 else ():
            assert any(breaks(found, without(shapes.kept(c), name, dim), c) for c in choices), (
                f"{name}{dim} in {group.name}"
            )


def without(kept: dict[str, dict[int, list[int]]], name: str, dim: int) -> dict[str, dict[int, list[int]]]:
    return {n: {d: k for d, k in dims.items() if (n, d) != (name, dim)} for n, dims in kept.items()}


def breaks(found: Found, kept: dict[str, dict[int, list[int]]], choice: Any) -> bool:
    try:
        small, want = run_small(found, kept, choice), reference(found, kept)
    except (RuntimeError, IndexError, ProofError):
        return True
    return small.numel() != want.numel() or not torch.allclose(
        small.flatten().double(), want.double(), rtol=1e-9, atol=1e-9
    )


def test_every_case_that_is_frozen_names_a_reason() -> None:
    for case in CASES:
        found = analyse(case)
        frozen = find_frozen(found.propagation, found.solution)
        assert all(item.reason and item.slots for item in frozen)


def test_registry_is_a_table() -> None:
    assert len(known()) > 150
    assert {entry.family.value for entry in known().values()} >= {
        "movement",
        "elementwise",
        "contraction",
        "reduction",
        "factory",
    }


def test_a_large_join_keeps_every_pair() -> None:
    constraints = Constraints()
    left, right = constraints.new(70_000), constraints.new(70_000)[::-1]
    constraints.join(np.concatenate([left, left[:5]]), np.concatenate([right, right[:5]]))  # repeated
    (join,) = constraints.joins
    assert len(join.left) == 70_000
    assert dict(zip(join.left.tolist(), join.right.tolist(), strict=True)) == dict(
        zip(left.tolist(), right.tolist(), strict=True)
    )
