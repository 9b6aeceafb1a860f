"""Ratios, budgets, scopes, rounding and criteria, against direct computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from motifs import MOTIFS, GroupedQueries, MultiHead, RepeatedKeys, SeparateQKV
from torch import Tensor, nn

import surgeon
from surgeon import criteria
from surgeon.errors import BudgetError, InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = (
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.Conv2d(32, 48, 1),
            nn.Conv2d(48, 24, 1),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.n(self.a(x)).relu()).relu()).relu()
        return self.head(y.mean((2, 3)))


X = torch.randn(1, 3, 6, 6)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.n.weight.uniform_(0.1, 2)
    return net


def widths(small: nn.Module) -> list[int]:
    return [small.a.out_channels, small.b.out_channels, small.c.out_channels]


def test_uniform_ratio(model: Net) -> None:
    assert widths(surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)) == [16, 24, 12]
    assert widths(surgeon.shrink(model, 0.0, example_inputs=X)) == [32, 48, 24]
    assert widths(surgeon.shrink(model, 0.999, example_inputs=X, round_to=1)) == [1, 1, 1]


def test_l1_keeps_the_largest(model: Net) -> None:
    """The scores of one group, computed by hand from its two weights."""
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    own = model.b.weight.detach().abs().sum((1, 2, 3)).double()
    following = model.c.weight.detach().abs().sum((0, 2, 3)).double()
    score = own / own.mean() + following / following.mean()
    assert plan.kept["b.weight"][0] == sorted(score.argsort()[-24:].tolist())
    assert plan.kept["b.weight"][0] == plan.kept["c.weight"][1] == plan.kept["b.bias"][0]


def test_l2_against_a_direct_computation(model: Net) -> None:
    surgery = surgeon.inspect(model, X)
    group = next(g for g in surgery.groups if g.name == "b.weight[0]")
    own = model.b.weight.detach().double().pow(2).sum((1, 2, 3)).sqrt()
    following = model.c.weight.detach().double().pow(2).sum((0, 2, 3)).sqrt()
    want = (own / own.mean() + following / following.mean()) / 2
    np.testing.assert_allclose(
        criteria.criterion("l2")(group, surgery.graph.tensors), want.numpy(), rtol=1e-6
    )


def test_bn_scale_against_a_direct_computation(model: Net) -> None:
    plan = surgeon.inspect(model, X).plan(0.5, criterion="bn_scale", round_to=1, ignore=["b", "c"])
    assert plan.kept["a.weight"][0] == sorted(model.n.weight.detach().abs().argsort()[-16:].tolist())
    assert set(plan.kept) == {
        "a.weight",
        "a.bias",
        "n.weight",
        "n.bias",
        "n.running_mean",
        "n.running_var",
        "b.weight",
    }


def test_random_is_seeded(model: Net) -> None:
    surgery = surgeon.inspect(model, X)
    first, again, other = (surgery.plan(0.5, criterion="random", seed=s).kept for s in (1, 1, 2))
    assert first == again != other


def test_a_callable_is_a_criterion(model: Net) -> None:
    plan = surgeon.inspect(model, X).plan(
        0.25, criterion=lambda group, tensors: np.arange(group.units), round_to=1
    )
    assert plan.kept["a.weight"][0] == list(range(8, 32))


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("budget", [0.8, 0.5, 0.2])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_budgets_hold_and_are_met_closely(model: Net, kind: str, budget: float, scope: str) -> None:
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(scope=scope, round_to=1, **{kind: budget})
    before, after = getattr(surgery, kind), getattr(plan, kind)
    assert after <= budget * before
    assert after >= (budget - 0.08) * before
    small = plan.apply(model)
    again = surgeon.inspect(small, X)
    assert (again.macs, again.params) == (plan.macs, plan.params)
    assert plan.params == sum(p.numel() for p in small.parameters())
    absolute = surgery.plan(scope=scope, round_to=1, **{kind: float(round(budget * before))})
    assert getattr(absolute, kind) <= round(budget * before)


def test_global_takes_the_lowest_wherever_they_are(model: Net) -> None:
    with torch.no_grad():
        model.b.weight[:24] *= 1e-3
        model.b.bias[:24] = 0
        model.c.weight[:, :24] *= 1e-3
    small = surgeon.shrink(model, 24 / 104, example_inputs=X, scope="global", round_to=1)
    assert widths(small) == [32, 24, 24]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_round_to(model: Net, ratio: float) -> None:
    small = surgeon.shrink(model, ratio, example_inputs=X, round_to=8)
    assert all(w % 8 == 0 and w >= 8 for w in widths(small))
    nearest = [max(8, 8 * round(n * (1 - ratio) / 8 + 1e-9)) for n in (32, 48, 24)]
    assert all(abs(w - n) <= 8 for w, n in zip(widths(small), nearest, strict=True))


def test_ignore_keeps_outputs(model: Net) -> None:
    for name in (["b"], [model.b], "b"):
        assert widths(surgeon.shrink(model, 0.5, example_inputs=X, ignore=name, round_to=1)) == [16, 48, 12]


def test_ignore_one_branch_of_a_concat() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], -1))

    small = surgeon.shrink(Cat(), 0.5, example_inputs=torch.randn(2, 4), ignore=["a"])
    assert (small.a.out_features, small.b.out_features, small.c.in_features) == (8, 4, 12)


def test_macs_agree_with_torch(model: Net) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    attention = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    for net, x in ((model, X), (attention, torch.randn(2, 5, 16))):
        plain = torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH
        )  # the counter knows the fused one on GPUs only
        with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(False)
            net(x)
            torch.backends.mha.set_fastpath_enabled(True)
        assert surgeon.inspect(net, x).macs == counter.get_total_flops() // 2


def test_macs_of_products_that_the_counter_does_not_know() -> None:
    assert surgeon.inspect(nn.Bilinear(3, 5, 6), (torch.randn(4, 3), torch.randn(4, 5))).macs == 4 * 6 * 3 * 5


def test_the_weakest_head_leaves_whole() -> None:
    torch.manual_seed(0)
    model = SeparateQKV()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[6:12] *= 1e-4
        model.o.weight[:, 6:12] *= 1e-4
    plan = surgeon.inspect(model, torch.randn(2, 7, 5)).plan(0.25, round_to=1)
    assert set(range(24)) - set(plan.kept["o.weight"][1]) == set(range(6, 12))
    assert plan.apply(model).num_heads == 3


def test_known_criteria_are_listed() -> None:
    with pytest.raises(InputError, match="bn_scale, first, fpgm, l1, l2, lamp, random"):
        criteria.criterion("nope")


@pytest.mark.parametrize(
    ("make", "ratio", "expected"),
    [  # rows of q and of k, head dim
        (
            GroupedQueries,
            1 / 3,
            {"both": (16, 8, 4), "whole": (16, 8, 4), "dims": (18, 9, 3)},
        ),  # three heads of keys, six of queries
        (
            RepeatedKeys,
            1 / 2,
            {"both": (16, 8, 4), "whole": (16, 8, 4), "dims": (16, 8, 2)},
        ),  # four and eight
    ],
)
def test_heads_say_what_attention_may_lose(
    make: Any, ratio: float, expected: dict[str, tuple[int, ...]]
) -> None:
    """Whole heads with the queries that they serve, dims within heads, either, or nothing leaves."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 7, 5)
    surgery = surgeon.inspect(model, x)
    assert {g.kind: g.attention for g in surgery.groups} == {
        "rows": "heads",
        "middle": "heads",
        "columns": "head dims",
    }
    shapes = {}
    for heads in ("both", "whole", "dims"):
        plan = surgery.plan(ratio, heads=heads, round_to=1)
        small = plan.apply(model)
        assert surgeon.verify(model, small, plan, x).error < 1e-9
        shapes[heads] = (small.q.weight.shape[0], small.k.weight.shape[0], small.head_dim)
    assert shapes == expected
    with pytest.raises(BudgetError):
        surgery.plan(1 / 3, heads="keep")
    with pytest.raises(InputError, match="both, whole, dims, keep"):
        surgery.plan(1 / 3, heads="some")


def test_heads_that_are_kept_hold_the_widths_that_are_computed_from_them() -> None:
    model, x = MultiHead().eval(), torch.randn(2, 7, 5)
    with pytest.raises(BudgetError):  # the embedding's width is num_heads * head_dim
        surgeon.inspect(model, x).plan(0.5, heads="keep")


@pytest.mark.parametrize("name", ["separate_qkv", "convolution_over_heads", "heads_in_a_row"])
@pytest.mark.parametrize("ratio", [0.25, 1 / 3, 0.5, 0.75])
def test_a_ratio_by_name_takes_heads_or_dims_as_the_ratio_does(name: str, ratio: float) -> None:
    motif = next(m for m in MOTIFS if m.name == name)
    surgery = surgeon.inspect(motif.make(), torch.randn(motif.shape))
    assert surgery.plan({"*": ratio}, round_to=1).kept == surgery.plan(ratio, round_to=1).kept


class Transposed(nn.Module):
    """Layers whose weights hold the outputs in dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.head = (
            nn.Embedding(9, 6),
            nn.ConvTranspose1d(6, 10, 2, bias=False),
            nn.Linear(8, 3),
        )
        self.mixed = nn.Parameter(torch.randn(10, 8))

    def forward(self, words: Tensor) -> Tensor:
        return self.head((self.up(self.table(words).mT).relu().mT @ self.mixed).relu())


@pytest.mark.parametrize(("layer", "lost"), [("table", (3, 0, 0)), ("up", (0, 5, 0)), ("mixed", (0, 0, 4))])
def test_a_name_means_the_outputs_of_a_layer(layer: str, lost: tuple[int, int, int]) -> None:
    """Not what it reads, wherever its weight holds them: with ratios, caps and where each layer's share is
    measured.
    """
    model, x = Transposed().eval(), torch.tensor([[1, 2, 3]])
    surgery = surgeon.inspect(model, x)

    def widths(plan: surgeon.Plan) -> tuple[int, ...]:
        small = plan.apply(model)
        return 6 - small.table.embedding_dim, 10 - small.up.out_channels, 8 - small.mixed.shape[1]

    assert widths(surgery.plan({layer: 0.5}, round_to=1)) == lost
    capped = surgery.plan(0.5, max_ratio={layer: 0.0}, round_to=1)
    assert widths(capped) == tuple(0 if own else full for own, full in zip(lost, (3, 5, 4), strict=True))
    assert surgery.groups[[bool(n) for n in lost].index(True)].producers == (
        f"{layer}.weight" if layer != "mixed" else "mixed",
    )


class Experts(nn.Module):
    """Products by expert, whose kernel wants rows of 16 bytes."""

    def __init__(self, inner: int = 20) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 24), nn.Linear(24, 3)
        self.up, self.down = (
            nn.Parameter(torch.randn(3, 24, 2 * inner)),
            nn.Parameter(torch.randn(3, 24, inner)),
        )

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([3, 6, 9], dtype=torch.int32)
        gate, up = F.grouped_mm(self.a(x), self.up, offs=ends).chunk(2, -1)
        return self.b(F.grouped_mm(gate.relu() * up, self.down.mT, offs=ends))


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("name", ["ratio", "macs"])
def test_widths_that_a_kernel_wants_are_kept(ratio: float, name: str) -> None:
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(9, 5)
    plan = surgeon.inspect(model, x).plan(**{name: ratio}, round_to=1)
    small = plan.apply(model)
    assert {size % 4 for size in (*small.up.shape[1:], *small.down.shape[1:])} == {0}
    assert surgeon.verify(model, small, plan, x).error < 1e-12
    assert small.up.shape[2] == 2 * small.down.shape[2]
    assert small.up.numel() < model.up.numel()


def test_what_a_kernel_wants_is_not_given_up_where_blocks_are() -> None:
    """Blocks are halved where a group holds none that could leave; a kernel takes no half ones."""
    torch.manual_seed(0)
    model, x = Experts(4).eval(), torch.randn(9, 5)
    small = surgeon.shrink(model, 0.5, example_inputs=x)
    assert small.down.shape[2] == 4
    assert small.down.shape[1] in (8, 12, 16)
