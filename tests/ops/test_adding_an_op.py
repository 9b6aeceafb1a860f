"""Ops that are declared from outside, as a user would: one line each, and everything follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon import ops
from surgeon.capture.capture import capture
from surgeon.ops import table
from surgeon.ops.macs import macs_of

library = torch.library.Library("newops", "DEF")
library.define(
    "attend(Tensor q, Tensor k, Tensor v, bool flag, Tensor? bias=None, float? scale=None) -> Tensor"
)
library.define("project(Tensor rows, Tensor matrix) -> Tensor")


@torch.library.impl(library, "attend", "CPU")
def attend(q: Tensor, k: Tensor, v: Tensor, flag: bool, bias: Any = None, scale: Any = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@torch.library.impl(library, "project", "CPU")
def project(rows: Tensor, matrix: Tensor) -> Tensor:
    return (rows * 2) @ matrix.transpose(0, 1) / 2


@torch.library.impl(library, "attend", "Meta")
def _(q: Tensor, k: Tensor, v: Tensor, flag: bool, bias: Any = None, scale: Any = None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.impl(library, "project", "Meta")
def _(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], matrix.shape[0])


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test declares is gone after it."""
    monkeypatch.setattr(table, "_OPS", dict(table._OPS))
    return


class Attention(nn.Module):
    """Six heads of queries, two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.served, self.dim = 6, 2, 8
        self.q, self.k, self.v = nn.Linear(10, 48), nn.Linear(10, 16), nn.Linear(10, 16)
        self.out = nn.Linear(48, 4)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        def heads(y: Tensor, count: int) -> Tensor:
            return y.unflatten(-1, (count, self.dim)).transpose(1, 2)

        q, k, v = heads(self.q(x), self.heads), heads(self.k(x), self.served), heads(self.v(x), self.served)
        y = torch.ops.newops.attend(q, k, v, False, bias, 1 / math.sqrt(q.shape[-1]))
        return self.out(y.transpose(1, 2).flatten(2))


LETTERS = "q:n(hg)qd, k:nhkd, bias:+ -> n(hg)qk, v:nhke -> n(hg)qe"


def inspected() -> surgeon.Surgery:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 10), torch.randn(5, 5)
    return surgeon.inspect(Attention(), inputs)


def test_attention_that_is_not_declared_freezes_what_it_touches() -> None:
    assert any("newops::attend has no rule" in item.reason for item in inspected().frozen)


@pytest.mark.parametrize(("heads", "width"), [("whole", 24), ("both", 24), ("dims", 24)])
def test_attention_under_another_name_is_cut_like_any(heads: str, width: int) -> None:
    ops.attention("newops::attend", LETTERS)
    surgery = inspected()
    assert not any("no rule" in item.reason for item in surgery.frozen)
    plan = surgery.plan(0.5, heads=heads, round_to=1)
    projections = 2 * 5 * (10 * 48 + 2 * 10 * 16 + 48 * 4)
    assert plan.macs_before == projections + 2 * 6 * 5 * 5 * (8 + 8)
    small = plan.apply(surgery.model)
    proof = surgeon.verify(surgery.model, small, plan, graph=surgery.runs)
    assert small.q.out_features == width and proof.error < 1e-9
    assert macs_of(capture(small, surgery.graph.args)) == plan.macs


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.weight = nn.Parameter(torch.randn(16, 12))
        self.b = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.ops.newops.project(self.a(x).relu(), self.weight).relu())


def test_a_product_is_one_line() -> None:
    ops.op("newops::project", ops.Family.CONTRACTION, "rows:Rk, matrix:jk -> Rj")
    torch.manual_seed(0)
    surgery = surgeon.inspect(Projection(), torch.randn(2, 6))
    assert {group.name for group in surgery.groups} == {"a.weight[0]", "weight[0]"}
    plan = surgery.plan(0.5)
    assert plan.macs_before == 2 * (6 * 12 + 12 * 16 + 16 * 3)
    assert surgery.frozen_share.channels == 12 + 16
    plan = surgery.plan(0.5, criterion="variance", data=[torch.randn(8, 6)], round_to=1)
    small = plan.apply(surgery.model)
    assert small.weight.shape == (8, 6)
    assert surgeon.verify(surgery.model, small, plan, graph=surgery.runs).error < 1e-9


@pytest.mark.parametrize("name", ["logaddexp2", "logcumsumexp"])
def test_usual_ops_stand_in_one_place(name: str) -> None:
    assert name in table.known()
