"""Budgets, caps, aligned widths and ratios by name: what was asked holds, and what was predicted is what
there is.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgeon
from surgeon.errors import BudgetError, InputError
from surgeon.selection.amounts import parse
from surgeon.selection.cost import ShapeModel, nothing
from surgeon.selection.request import Request


class Stage(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.m = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x)).relu()
        return y + self.m(self.b(y)).relu_()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(Stage(3, 32), nn.MaxPool2d(2), Stage(32, 64), Stage(64, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


X = torch.randn(2, 3, 16, 16)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def widths(small: nn.Module) -> dict[str, int]:
    return {
        name: module.out_channels for name, module in small.named_modules() if isinstance(module, nn.Conv2d)
    }


# -- budgets -------------------------------------------------------------------------------------------------


def state_bytes(net: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


class Alive(TorchDispatchMode):
    """Bytes of the storages that live at once while a model runs, weights apart."""

    def __init__(self, net: nn.Module, *inputs: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
        self.now = self.peak = 0
        self.live: set[int] = set()
        for tensor in inputs:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known or key in self.live or not size:
            return
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out


def test_size_is_what_a_state_dict_holds(model: Net) -> None:
    plan = surgeon.inspect(model, X).plan(size=0.5, round_to=1)
    small = plan.apply(model)
    assert 0.45 * state_bytes(model) < state_bytes(small) <= 0.5 * state_bytes(model)
    assert plan.size == state_bytes(small)
    written = len(safetensors.torch.save(small.state_dict()))
    assert written - 200 * len(small.state_dict()) < plan.size < written


def test_memory_is_what_lives_at_once() -> None:
    """A plain chain, so that Python keeps nothing alive that the graph does not."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 24, 3, stride=2),
        nn.SiLU(),
        nn.Conv2d(24, 8, 1),
    ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 49, 5)).eval()
    surgery = surgeon.inspect(net, X)
    plan = surgery.plan(memory=0.7, round_to=1)
    small = plan.apply(net)
    for made, said in ((net, surgery.memory), (small, plan.memory)):
        with torch.no_grad(), Alive(made, X) as alive:
            made(X)
        assert alive.peak == said
    assert plan.memory <= 0.7 * surgery.memory


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("kind", ["macs", "params", "size", "memory"])
def test_no_band_could_keep_one_step_more(model: Net, kind: str, round_to: int) -> None:
    surgery = surgeon.inspect(model, X)
    limit = 0.6 * getattr(surgery, kind)
    plan = surgery.plan(round_to=round_to, **{kind: 0.6})
    small = plan.apply(model)
    assert getattr(surgeon.inspect(small, X), kind) == getattr(plan, kind) <= limit
    if kind == "memory":
        return  # one wide value decides; the others are not in its way
    for group in surgery.groups:  # one step of any group costs more than what is left of the budget
        member = group.members[0]
        kept = len(plan.kept.get(member.tensor, {}).get(member.dim, range(group.width)))
        if kept < group.width:
            wider = surgery.plan({"*": 0.0, **{m.tensor: 0.0 for m in group.members}}, round_to=1)
            step = (getattr(wider, kind) - getattr(plan, kind)) / (group.width - kept)
            assert limit - getattr(plan, kind) < 8 * max(1, round_to) * max(step, 1)


def test_several_budgets_all_hold(model: Net) -> None:
    surgery = surgeon.inspect(model, X)
    plan = surgery.plan(macs=0.5, params="40%", memory=0.9, round_to=1)
    assert plan.macs <= 0.5 * surgery.macs
    assert plan.params <= 0.4 * surgery.params
    assert plan.memory <= 0.9 * surgery.memory
    alone = surgery.plan(params=0.4, round_to=1)
    assert plan.params <= alone.params


@pytest.mark.parametrize(
    ("kind", "text", "want"),
    [
        ("macs", "1.2G", (1.2e9, False)),
        ("params", "3m", (3e6, False)),
        ("macs", 2e9, (2e9, False)),
        ("params", 1, (1.0, True)),
        ("size", "3MB", (3e6, False)),
        ("size", "3 MiB", (3 * 2**20, False)),
        ("memory", "50%", (0.5, True)),
        ("memory", "0.25", (0.25, True)),
        ("latency", "8ms", (8.0, False)),
        ("latency", "0.5s", (500.0, False)),
    ],
)
def test_units(kind: str, text: Any, want: tuple[float, bool]) -> None:
    assert parse(kind, text) == pytest.approx(want)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("macs", "1.2GB"), ("latency", 8), ("size", "1.2.3MB"), ("params", "many"), ("macs", True)],
)
def test_units_that_do_not_fit(kind: str, text: Any) -> None:
    with pytest.raises(InputError, match=kind):
        parse(kind, text)


def test_a_budget_below_the_floor_names_what_holds_it_up(model: Net) -> None:
    wide = nn.Sequential(nn.Linear(3000, 8), nn.Linear(8, 2))
    with pytest.raises(
        BudgetError,
        match=r"least that can stay[\s\S]*0\.weight \([\d,]+ params\)[\s\S]*ask for at least params=0\.12",
    ):
        surgeon.shrink(wide, params=0.01, round_to=1, example_inputs=torch.randn(1, 3000))


# -- caps, floors, names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["uniform", "global", "isomorphic"])
def test_a_cap_holds_under_every_scope_and_budget(model: Net, scope: str) -> None:
    with torch.no_grad():
        model.stages[2].a.weight *= 1e-3  # would all leave
    for asked in ({"ratio": 0.6}, {"macs": 0.35}):
        small = surgeon.shrink(model, example_inputs=X, scope=scope, round_to=1, max_ratio=0.7, **asked)
        before, after = widths(model), widths(small)
        assert all(after[name] >= 0.3 * before[name] - 1e-9 for name in before)
    small = surgeon.shrink(
        model, 0.6, example_inputs=X, scope=scope, round_to=1, max_ratio={"stages.2": 0.25}
    )
    assert widths(small)["stages.2.a"] >= 48
    assert (
        min(
            widths(
                surgeon.shrink(model, 0.9, example_inputs=X, scope=scope, round_to=1, min_channels=12)
            ).values()
        )
        >= 12
    )


def test_ratios_by_name(model: Net) -> None:
    small = surgeon.shrink(model, {"*": 0.5, "stages.2": 0.25, "stages.3.*": 0}, example_inputs=X, round_to=1)
    assert widths(small) == {
        "stages.0.a": 16, "stages.0.b": 16, "stages.2.a": 48, "stages.2.b": 48, "stages.3.a": 48, "stages.3.b": 48,
    }  # fmt: skip
    only = surgeon.shrink(model, {"stages.0.a": 0.5}, example_inputs=X, round_to=1)
    assert widths(only)["stages.0.a"] == 16
    assert widths(only)["stages.2.a"] == 64


def test_inputs_of_a_layer_stay(model: Net) -> None:
    small = surgeon.shrink(model, 0.5, example_inputs=X, round_to=1, ignore_inputs=["head"])
    assert small.head.in_features == 48
    assert widths(small)["stages.2.a"] == 32
    again = surgeon.shrink(model, 0.5, example_inputs=X, round_to=1, ignore_inputs=model.stages[2])
    assert (again.stages[2].a.in_channels, again.stages[2].a.out_channels) == (32, 32)


def test_like_groups_compete_among_themselves() -> None:
    """Weights of one kind are a hundred times smaller: globally they all leave, among their like they do
    not.
    """

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
            self.lines, self.heads = (
                nn.ModuleList([nn.Linear(3, 16), nn.Linear(3, 16)]),
                nn.ModuleList([nn.Linear(16, 2) for _ in range(4)]),
            )

        def forward(self, x: Tensor) -> Tensor:
            maps = [n(c(x)).relu().mean((2, 3)) for c, n in zip(self.convs, self.norms, strict=True)]
            flat = [line(x.mean((2, 3))).relu() for line in self.lines]
            return sum(head(y) for head, y in zip(self.heads, [*maps, *flat], strict=True))

    torch.manual_seed(0)
    net = Two().eval()
    score = {"convs.0": 1.0, "convs.1": 2.0, "lines.0": 100.0, "lines.1": 200.0}

    def criterion(group: Any, tensors: Any) -> Any:
        base = next(value for name, value in score.items() if group.name.startswith(name))
        return base * (1 + torch.arange(group.units) / 100)

    kept = {}
    for scope in ("global", "isomorphic"):
        small = surgeon.shrink(net, 0.25, example_inputs=X, scope=scope, criterion=criterion, round_to=1)
        kept[scope] = [c.out_channels for c in small.convs] + [line.out_features for line in small.lines]
    assert kept["global"] == [1, 15, 16, 16]
    assert kept["isomorphic"] == [8, 16, 8, 16]


# -- aligned widths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa, block", [("AVX2", 8), ("AVX512", 16)])
@pytest.mark.parametrize("asked", [{"ratio": 0.3}, {"macs": 0.5}, {"params": 0.3}, {"ratio": 0.75}])
def test_auto_keeps_whole_blocks(
    model: Net, asked: dict[str, Any], isa: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: isa)
    plan = surgeon.inspect(model, X).plan(**asked)
    assert plan.request["block"] == block
    before = widths(model)
    for name, width in widths(plan.apply(model)).items():
        whole = [n for n in range(block, before[name] + 1, block) if "ratio" in asked]
        near = [n for n in whole if abs(1 - n / before[name] - asked["ratio"]) <= 0.1]
        assert width % (8 if whole and not near else block) == 0, name
        assert width >= 8


def test_auto_gives_way_where_groups_are_narrow() -> None:
    net = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 3))
    small = surgeon.shrink(net, 0.5, example_inputs=torch.randn(2, 4))
    assert [layer.out_features for layer in small] == [6, 3, 3]  # blocks of 4 and of 2 would miss the ratio


def narrow(share: float, **options: Any) -> tuple[list[int], surgeon.Plan]:
    """Widths that a budget of MACs leaves of convolutions of 16, 16 and 64 channels and 10 outputs, of blocks
    of 16.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 10, 3),
    )
    plan = surgeon.inspect(net, torch.randn(1, 3, 12, 12)).plan(macs=share, **options)
    assert plan.macs <= share * plan.macs_before
    return [layer.out_channels for layer in plan.apply(net)[:-1:2]], plan


def test_auto_gives_way_to_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 first; then groups that are one block wide may keep less; then smaller blocks; each step
    is said.
    """
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept, plan = narrow(0.5)
    assert kept[:2] == [16, 16]
    assert plan.request["block"] == 16
    with pytest.warns(
        UserWarning, match="no whole blocks of 16 channels .* multiples of 16, in narrow groups"
    ):
        kept, plan = narrow(0.25)
    assert all(width % 8 == 0 for width in kept[:2])
    assert (kept[2] % 16, plan.request["block"]) == (0, 16)
    with pytest.warns(UserWarning, match="multiples of 4"):
        kept, plan = narrow(0.06)
    assert all(width % 4 == 0 for width in kept)
    assert plan.request["block"] == 4
    for named in (16, "npu"):  # what was asked for by name holds
        with pytest.raises(BudgetError, match="cannot be reached"):
            narrow(0.06, round_to=named)


def test_blocks_of_targets() -> None:
    assert [Request.of(0.5, round_to=name).block("cpu") for name in ("npu", "cuda", 5)] == [32, 8, 5]
    assert Request.of(0.5).block("cuda") == 8
    assert Request.of(0.5).block("cpu") == (16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("attends", [False, True])
def test_costs_follow_the_choice(seed: int, attends: bool) -> None:
    """What is kept from one choice to the next gives what a fresh computation gives, whatever changed in
    between.
    """
    rng = np.random.default_rng(seed)
    encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    net = nn.Sequential(nn.Linear(8, 32), encoder, nn.Linear(32, 4)) if attends else Net()
    found = surgeon.inspect(net.eval(), torch.randn(2, 5, 8) if attends else X)
    choice = nothing(found.solution)
    for _ in range(40):
        choice = choice.copy()
        group = found.groups[rng.integers(len(found.groups))]
        sets = group.sets[:, rng.permutation(group.steps)[: rng.integers(1, group.steps)]]
        choice[sets.ravel()] = rng.random() < 0.6
        fresh = ShapeModel(found.graph, found.propagation, found.solution)
        for kind in rng.permutation(["macs", "params", "size", "memory"])[: rng.integers(1, 5)]:
            assert getattr(found.shapes, kind)(choice) == getattr(fresh, kind)(choice), kind
