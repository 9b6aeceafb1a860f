"""Hollow runs: kernels that give what torch's give but for the numbers, and records that do not tell the difference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from motifs import MOTIFS, Motif
from torch import Tensor, nn

import surgeon
from surgeon.capture.capture import capture
from surgeon.capture.hollow.kernels import OTHERS, PRODUCTS
from surgeon.graph.graph import Graph

aten = torch.ops.aten


def _convolutions() -> Iterator[tuple[Any, ...]]:
    for dims, groups, stride, padding, dilation in itertools.product(
        (1, 2, 3), (1, 2), (1, 2), (0, 1), (1, 2)
    ):
        x, weight = torch.randn(2, 4, *[7] * dims), torch.randn(6, 4 // groups, *[3] * dims)
        for bias in (None, torch.randn(6)):
            yield (
                x,
                weight,
                bias,
                [stride] * dims,
                [padding] * dims,
                [dilation] * dims,
                False,
                [0] * dims,
                groups,
            )


def _norms() -> Iterator[tuple[Any, ...]]:
    for x, training in itertools.product(
        (torch.randn(3, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 3, 3)), (True, False)
    ):
        yield x, torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), training, 0.1, 1e-5
        yield x, None, None, torch.zeros(4), torch.ones(4), training, 0.1, 1e-5


def _attentions() -> Iterator[tuple[Any, ...]]:
    plain = torch.randn(2, 3, 5, 8)
    for q in (
        plain,
        torch.randn(2, 5, 3, 8).transpose(1, 2),
        torch.randn(2, 5, 3, 3, 8)[:, :, 0].transpose(1, 2),
    ):
        yield q, plain, plain
        yield q, plain, plain, 0.0, True


A, B = torch.randn(3, 4), torch.randn(4, 5)
ARGUMENTS: dict[Any, list[tuple[Any, ...]]] = {
    aten.convolution.default: list(_convolutions()),
    aten.addmm.default: [(torch.randn(5), A, B), (torch.randn(1), A, B), (torch.randn(5), B.t(), A.t()[:, :2].contiguous())],
    aten.mm.default: [(A, B), (B.t(), A.t())],
    aten.bmm.default: [(A[None], B[None]), (torch.randn(2, 4, 3).transpose(1, 2), torch.randn(2, 4, 5))],
    aten._scaled_dot_product_flash_attention_for_cpu.default: list(_attentions()),
    aten.native_batch_norm.default: list(_norms()),
    aten.native_layer_norm.default: [(A, [4], None, None, 1e-5), (torch.randn(2, 3, 4), [3, 4], torch.ones(3, 4), None, 1e-5)],
    aten._softmax.default: [(A, 0, False), (A, -1, False)],
}  # fmt: skip
MEMORY = [A, A.double(), A.t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), A[:, ::2]]


def arguments_of(op: Any) -> list[tuple[Any, ...]]:
    if op in ARGUMENTS:
        return ARGUMENTS[op]
    two = len([a for a in op._schema.arguments if not a.has_default_value()]) > 1
    return [(a.clone(), *rest) for a in MEMORY for rest in (((a.clone(),), (2.0,)) if two else ((),))]


@pytest.mark.parametrize("op", [*PRODUCTS, *OTHERS], ids=str)
def test_kernels_give_what_the_ops_give_but_for_the_numbers(op: Any) -> None:
    """Shapes, types and the order in memory, for all arguments that a kernel takes on."""
    taken = 0
    for args in arguments_of(op):
        made = {**PRODUCTS, **OTHERS}[op](*args)
        if made is None:
            continue
        taken += 1
        wanted = op(*args)
        for a, b in zip(*([t] if isinstance(t, Tensor) else t for t in (made, wanted)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), args
    assert taken


W, PLAIN = torch.randn(6, 4, 3, 3), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
MISFITS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.convolution.default, (torch.randn(1, 5, 8, 8), W, None, *PLAIN)),
    (aten.convolution.default, (torch.randn(1, 4, 2, 2), W, None, *PLAIN)),
    (aten.convolution.default, (torch.randn(1, 4, 8, 8), W, torch.randn(5), *PLAIN)),
    (aten.addmm.default, (torch.randn(4), A, B)),
    (aten.mm.default, (A, A)),
    (aten.bmm.default, (A[None], A[None])),
    (aten.native_batch_norm.default, (torch.randn(2, 5, 3), *(torch.ones(4) for _ in range(4)), False, 0.1, 1e-5)),
    (aten.native_layer_norm.default, (A, [3], None, None, 1e-5)),
    (aten.add.Tensor, (A, B)),
    (aten.add_.Tensor, (A.clone(), B)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "args"), MISFITS, ids=lambda item: "" if isinstance(item, tuple) else str(item)
)
def test_kernels_leave_arguments_that_do_not_fit_to_the_op(op: Any, args: tuple[Any, ...]) -> None:
    """So that the error is torch's."""
    assert {**PRODUCTS, **OTHERS}[op](*args) is None


def said(graph: Graph) -> list[Any]:
    """A record with nodes in order in place of their names."""
    place = {node: i for i, node in enumerate(graph.fx.nodes)}
    turned = [torch.fx.node.map_arg((n.args, n.kwargs), lambda a: place[a]) for n in graph.fx.nodes]
    kept = ("spec", "source", "module", "layout", "decided", "derived")
    return [
        (n.op, n.target, repr(args), [repr(n.meta.get(key)) for key in kept])
        for n, args in zip(graph.fx.nodes, turned, strict=True)
        if n.op != "get_attr"
    ]


@pytest.mark.parametrize("motif", MOTIFS, ids=lambda motif: motif.name)
@pytest.mark.parametrize("training", [False, True])
def test_records_are_the_same(motif: Motif, training: bool) -> None:
    model, x = motif.make(), torch.randn(motif.shape)
    real = capture(model, x, training=training, real=True)
    assert said(capture(model, x, training=training)) == said(real)


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 8), nn.Linear(8, 3), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.way == "value" and bool(x.sum() > 1e9):
            return x
        if self.way == "numpy":
            x = x + float(x.detach().numpy().max())
        if self.way == "list":
            x = x + x.flatten().tolist()[0]
        if self.way == "index":
            x = x[:, x[0].argsort()]
        if self.way == "strict" and not torch.isfinite(x).all():
            raise ValueError("not finite")
        if self.way == "caught":
            try:
                x = x * x.max().item()
            except BaseException:  # noqa: BLE001  # as some code does
                x = x * 2
        return self.b(x)


@pytest.mark.parametrize("way", ["value", "numpy", "list", "index", "strict", "caught"])
def test_code_that_reads_a_number_gets_the_true_one(way: str) -> None:
    model = Net(way).eval()
    x = torch.randn(2, 4)
    graph = capture(model, x)
    assert graph.results is not None
    torch.testing.assert_close(graph.results[0], model(x).detach())


def test_code_that_reads_none_is_not_run_for_numbers() -> None:
    assert capture(Net("plain"), torch.randn(2, 4)).results is None


SEEN: list[Tensor] = []


@torch.library.custom_op("hollow_test::trusting", mutates_args=())
def trusting(x: Tensor) -> Tensor:
    SEEN.append(x.clone())
    return x.clone()


class Trusting(nn.Module):
    def __init__(self, solves: bool) -> None:
        super().__init__()
        self.a, self.b, self.solves = nn.Linear(4, 8), nn.Linear(8, 3), solves

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.solves:
            return self.b(x) @ torch.linalg.inv(x.t() @ x + torch.eye(8))[:3, :3]
        return self.b(trusting(x))


@pytest.mark.parametrize("solves", [False, True])
def test_ops_that_trust_their_numbers_get_true_ones(solves: bool) -> None:
    SEEN.clear()
    model, x = Trusting(solves).eval(), torch.randn(2, 4)
    graph = capture(model, x)
    assert graph.results is not None
    for seen in SEEN:
        torch.testing.assert_close(seen, model.a(x).detach())


TABLES: dict[int, Tensor] = {}


class Tabled(nn.Module):
    """Keeps what it makes of its weights and of positions where no module holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not TABLES:
            TABLES[0] = self.mix.weight.detach() @ self.mix.weight.detach().t()
            TABLES[1] = torch.arange(4.0)[None] @ torch.ones(4, 4)
            TABLES[2] = x @ torch.eye(4)
        return self.out(x @ TABLES[0] + TABLES[1])


def test_tables_that_code_keeps_elsewhere_hold_numbers() -> None:
    TABLES.clear()
    model, x = Tabled().eval(), torch.randn(2, 4)
    surgeon.inspect(model, x)
    weight = model.mix.weight.detach()
    torch.testing.assert_close(TABLES[0], weight @ weight.t())
    torch.testing.assert_close(TABLES[1], torch.arange(4.0)[None] @ torch.ones(4, 4))
    torch.testing.assert_close(TABLES[2], x)


class Counted(nn.Module):
    """Adds what it computes to a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        found = self.a(x)
        assert isinstance(self.total, Tensor)
        self.total.add_(found[0])
        self.total.clamp_(min=-1, max=1)
        return found * self.total


def test_what_a_hollow_run_writes_is_put_back() -> None:
    model = Counted().eval()
    assert capture(model, torch.randn(2, 4)).results is None
    assert torch.equal(model.total, torch.zeros(8))
