"""Every criterion against a brute-force computation on tiny models, and what may go wrong with data."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from motifs import GroupedQueries, MultiHead, SeparateQKV
from torch import Tensor, nn

import surgeon
from surgeon import criteria
from surgeon.capture.meta_run import PlainMode
from surgeon.coupling.groups import Group
from surgeon.criteria.data.stand_ins import output_energy, output_probe
from surgeon.errors import InputError

FROM_DATA = [name for name in criteria.BUILT_IN if criteria.looks_at_data(name)]
X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """conv, batch norm, relu, conv, relu, pool, flatten, linear: channels of b are nine entries each of the
    head's input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 5, 3, padding=1)
        self.head = nn.Linear(5 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.n(self.a(x)).relu_()).relu_()
        return self.head(nn.functional.max_pool2d(y, 2).flatten(1))


class Grouped(nn.Module):
    """A grouped convolution reads a; a depthwise one stands between b and its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, groups=2)
        self.d, self.c = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.d(self.b(self.a(x).relu()).relu()).relu())


def made(kind: Callable[[], nn.Module], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = kind().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(0.1, 0.4)
    return model


def batches(sizes: tuple[int, ...], shape: tuple[int, ...] = (3, 6, 6), seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator) for n in sizes]


def ready(which: Any, surgery: surgeon.Surgery, data: Any = None, **options: Any) -> Any:
    parts = {name: getattr(surgery, name) for name in ("model", "graph", "propagation", "solution", "groups")}
    return criteria.prepare(which, **parts, data=data, **options)


def scored(which: Any, surgery: surgeon.Surgery, data: Any = None, **options: Any) -> dict[str, np.ndarray]:
    """Group name -> scores."""
    found = ready(which, surgery, data, **options)
    return {g.name: criteria.scores(found, g, surgery.graph.tensors).ravel() for g in surgery.groups}


def read(model: nn.Module, name: str, data: list[Tensor]) -> Tensor:
    """What a module reads, over all batches, seen by a hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat(seen).double()


def per_channel(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N * H * W, C]."""
    return x.movedim(1, -1).flatten(0, -2)


def check(found: np.ndarray, want: Tensor, tolerance: float = 1e-5) -> None:
    assert want.std() > 0  # a constant would prove nothing
    np.testing.assert_allclose(found, want.detach().double().numpy(), rtol=tolerance)


def relative(score: Tensor) -> Tensor:
    return score / score.mean()


LABELS = torch.Generator().manual_seed(3)
SIZES = pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2), (5,)], ids=str)


def labelled(data: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randint(0, 4, (len(x),), generator=LABELS)) for x in data]


# -- from gradients ------------------------------------------------------------------------------------------


def gradients(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """The parameters' gradients of each batch, the plain way."""
    found = []
    for x, y in pairs:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        found.append({name: p.grad.double().clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return found


def slots_of_a(model: nn.Module, values: dict[str, Tensor]) -> list[Tensor]:
    """A value of each weight of what leaves with the channels of `a`, one row per channel, by slot."""
    own = [
        values["a.weight"].flatten(1),
        values["a.bias"][:, None],
        values["n.weight"][:, None],
        values["n.bias"][:, None],
    ]
    return [*own, values["b.weight"].transpose(0, 1).flatten(1)]


@SIZES
def test_gradient_criteria_against_autograd(sizes: tuple[int, ...]) -> None:
    model = made(Net)
    surgery = surgeon.inspect(model, X)
    pairs = labelled(batches(sizes))
    found = gradients(model, pairs)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    slots = [list(zip(slots_of_a(model, weights), slots_of_a(model, g), strict=True)) for g in found]
    places = range(len(slots[0]))

    def over_batches(part: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        return [torch.stack([part(*batch[s]) for batch in slots]).mean(0) for s in places]

    want = {
        "taylor": sum(over_batches(lambda w, g: (w * g).sum(1) ** 2)),
        "fisher": torch.stack([relative(s) for s in over_batches(lambda w, g: (w * g).square().sum(1))]).mean(
            0
        ),
        "gradient": torch.stack(
            [relative(s.sqrt()) for s in over_batches(lambda w, g: g.square().sum(1))]
        ).mean(0),
    }
    mean = [torch.stack([batch[s][1] for batch in slots]).mean(0) for s in places]
    apart = sum((slots[0][s][0] * mean[s]).abs().sum(1) for s in places)
    for name, score in want.items():
        check(scored(name, surgery, pairs, loss=nn.CrossEntropyLoss())["a.weight[0]"], score)
    loss = nn.functional.cross_entropy
    check(scored(criteria.Taylor(joint=False), surgery, iter(pairs), loss=loss)["a.weight[0]"], apart)


def test_taylor_is_the_gradient_of_a_gate() -> None:
    """Scaling what b reads by a gate of ones: the gate's squared gradient is what the slot of b's inputs
    says.
    """
    model = made(Net)
    (pair,) = pairs = labelled(batches((6,)))
    gate = torch.ones(8, requires_grad=True)
    handle = model.b.register_forward_pre_hook(lambda _, args: args[0] * gate[:, None, None])
    nn.functional.cross_entropy(model(pair[0]), pair[1]).backward()
    handle.remove()
    found = ready("taylor", surgery := surgeon.inspect(model, X), pairs, loss=nn.CrossEntropyLoss())
    group = surgery.groups[0]
    member = next(m for m in group.members if m.tensor == "b.weight")
    check(found.part(member, group.units), gate.grad**2, 1e-4)


@SIZES
def test_taylor_activation_against_retained_gradients(sizes: tuple[int, ...]) -> None:
    model = made(Net)
    pairs = labelled(batches(sizes))
    want: dict[str, list[Tensor]] = {"b": [], "head": []}
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            args[0].retain_grad()
            seen[name] = args[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in want]
    for x, y in pairs:
        nn.functional.cross_entropy(model(x), y).backward()
        want["b"].append((seen["b"] * seen["b"].grad).mean((2, 3)).abs())
        want["head"].append((seen["head"] * seen["head"].grad).abs())
    for handle in handles:
        handle.remove()
    found = scored("taylor_activation", surgeon.inspect(model, X), pairs, loss=nn.CrossEntropyLoss())
    check(found["a.weight[0]"], relative(torch.cat(want["b"]).mean(0)))
    check(found["b.weight[0]"], relative(torch.cat(want["head"]).mean(0).reshape(5, 9).sum(1)))


def test_without_a_loss_the_outputs_energy_counts() -> None:
    model, data = made(Net), batches((3, 2))
    surgery = surgeon.inspect(model, X)

    def by_hand(output: Tensor, _: Any) -> Tensor:
        return (output**2).sum(1).mean()

    pairs = [(x, None) for x in data]
    for name in ("taylor", "taylor_activation", "fisher", "gradient"):
        want = scored(name, surgery, pairs, loss=by_hand)
        for group, score in scored(name, surgery, data).items():
            check(score, torch.from_numpy(want[group]))
    assert (
        output_energy({"x": torch.full((2, 3), 2.0), "index": torch.zeros(2, dtype=torch.long)}).item() == 12
    )
    assert output_energy(torch.tensor([3 + 4j]).conj()).item() == 25
    with pytest.raises(InputError, match="no float output"):
        output_energy(torch.zeros(2, dtype=torch.long))


# -- from activations ----------------------------------------------------------------------------------------


@SIZES
def test_activation_criteria_against_hooks(sizes: tuple[int, ...]) -> None:
    model, data = made(Net), batches(sizes)
    surgery = surgeon.inspect(model, X)
    x = per_channel(read(model, "b", data))
    w = model.b.weight.detach().double().transpose(0, 1).flatten(1)
    flat, v = read(model, "head", data), model.head.weight.detach().double().T
    want = {
        "activation_mean": (x.abs().mean(0), flat.abs().mean(0).reshape(5, 9).mean(1)),
        "activation_l2": (
            x.square().mean(0).sqrt() * w.abs().sum(1),
            (flat.square().mean(0).sqrt() * v.abs().sum(1)).reshape(5, 9).sum(1),
        ),
        "variance": (
            x.var(0, correction=0) * w.square().sum(1),
            (flat.var(0, correction=0) * v.square().sum(1)).reshape(5, 9).sum(1),
        ),
    }
    for name, (of_a, of_b) in want.items():
        found = scored(name, surgery, data)
        check(found["a.weight[0]"], relative(of_a))
        check(found["b.weight[0]"], relative(of_b))


def test_hrank_against_hooks() -> None:
    """The group of b is read by a linear layer only: its last maps, after the pooling, are looked at."""
    model = made(Net)
    data = batches((3, 4))
    for x in data:
        x[:, 2] = x[:, 0] * 0.5  # some structure
        x[:, :, 3:] = 0
    with torch.no_grad():
        model.n.bias[:4] = -1  # dark maps
        model.b.bias[:2] = -1.2
    found = scored("hrank", surgeon.inspect(model, X), data)
    ranks = torch.linalg.matrix_rank(read(model, "b", data).float()).double().mean(0)
    check(found["a.weight[0]"], relative(ranks))
    maps = read(model, "head", data).float().reshape(7, 5, 3, 3)
    check(found["b.weight[0]"], relative(torch.linalg.matrix_rank(maps).double().mean(0)))


def test_entropy_against_numpy() -> None:
    model, data = made(Net), batches((20, 13))
    found = scored(criteria.Entropy(bins=7), surgeon.inspect(model, X), data)
    means = read(model, "b", data).mean((2, 3)).numpy()
    counts = [np.histogram(column, bins=7)[0] / len(column) for column in means.T]
    want = np.array([-sum(p * np.log(p) for p in share if p > 0) for share in counts])
    check(found["a.weight[0]"], relative(torch.from_numpy(want)))


def test_obs_against_an_explicit_inverse() -> None:
    model, data = made(Net), batches((9, 4))
    found = scored(criteria.OBS(damping=0.03, normalize=None), surgeon.inspect(model, X), data)
    x = per_channel(read(model, "b", data))
    hessian = x.T @ x / len(x)
    hessian += 0.03 * hessian.diagonal().mean() * torch.eye(8)
    w = model.b.weight.detach().double().transpose(0, 1).flatten(1)
    check(found["a.weight[0]"], w.square().sum(1) / torch.linalg.inv(hessian).diagonal())


def test_obs_is_what_the_best_other_weights_lose() -> None:
    """Nine entries leave with each channel of b: the ridge regression on what stays loses exactly the
    score.
    """
    model, data = made(Net), batches((40, 30))
    found = scored(criteria.OBS(normalize=None), surgeon.inspect(model, X), data)["b.weight[0]"]
    x, w = read(model, "head", data), model.head.weight.detach().double()
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(45)
    want = []
    for channel in range(5):
        stays = torch.tensor([i // 9 != channel for i in range(45)])
        best = torch.zeros_like(w)
        best[:, stays] = torch.linalg.solve(hessian[stays][:, stays], hessian[stays] @ w.T).T
        change = best - w
        want.append((change @ hessian * change).sum())
    check(found, torch.stack(want), 1e-4)


class Pointwise(nn.Module):
    """A 1x1 convolution reads a, and writes what relu_ overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu_()).relu_().mean((2, 3)))


def test_kfac_against_every_subset_in_turn() -> None:
    """Units leave one by one, the least first; a score is what its leaving adds to the loss after the best
    refit of the rest, as the factors have it, times what the unit alone costs over what the factors have it
    cost."""
    model, data = made(Pointwise), batches((9, 4))
    pairs = [(x, torch.zeros(())) for x in data]
    found = scored(
        criteria.KFAC(damping=0.02), surgeon.inspect(model, X), pairs, loss=lambda out, _: out.square().sum()
    )
    sensitivity = torch.zeros(5, dtype=torch.float64)
    x = per_channel(read(model, "b", data))
    mean, exact = x.mean(0), torch.zeros(8, dtype=torch.float64)
    for batch in data:
        read_by_b = model.a(batch).relu().detach().requires_grad_()
        y = model.b(read_by_b)
        y.retain_grad()
        model.head(y.relu().mean((2, 3))).square().sum().backward()
        sensitivity += y.grad.double().square().sum((0, 2, 3))
        change = (mean[:, None, None] - read_by_b.detach().double()) * read_by_b.grad.double()
        exact += change.sum((2, 3)).square().sum(0)
    centred = x - mean
    hessian = centred.T @ centred / len(x)
    w = model.b.weight.detach().double().flatten(1)  # [5, 8]
    share = exact / (hessian.diagonal() * (w.square() * sensitivity[:, None]).sum(0))
    assert share.max() > 2 * share.min(), "else the factors would do"
    hessian += 0.02 * hessian.diagonal().mean() * torch.eye(8)

    def lost(gone: list[int]) -> float:
        stays = [i for i in range(8) if i not in gone]
        best = torch.zeros_like(w)
        best[:, stays] = torch.linalg.solve(hessian[stays][:, stays], hessian[stays] @ w.T).T
        return float(((best - w) @ hessian * (best - w)).sum(1) @ sensitivity)

    def adds(unit: int) -> float:
        return (lost([*gone, unit]) - lost(gone)) * float(share[unit])

    want, gone = np.zeros(8), []
    for _ in range(8):
        unit = min((i for i in range(8) if i not in gone), key=adds)
        want[unit] = max(adds(unit), want.max())
        gone.append(unit)
    check(found["a.weight[0]"], torch.from_numpy(want), 1e-4)
    alone = scored(
        criteria.KFAC(damping=0.02, stepwise=0),
        surgeon.inspect(model, X),
        pairs,
        loss=lambda o, _: o.square().sum(),
    )
    gone = []
    check(alone["a.weight[0]"], torch.tensor([adds(i) for i in range(8)]), 1e-4)
    assert not np.allclose(alone["a.weight[0]"], want), "one by one is something else than alone"


class Pooled(nn.Module):
    """Nothing but linear maps, to one output: what a cut costs is known exactly, whatever the signs of the
    probe.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.make = {
            "1x1": lambda i, o: nn.Conv2d(i, o, 1),
            "3x3": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
            "tokens": nn.Linear,
        }
        self.a, self.b, self.head = self.make[kind](6, 6), self.make[kind](6, 5), nn.Linear(5, 1)
        self.channels = -1 if kind == "tokens" else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x))

    def rest(self, y: Tensor) -> Tensor:
        return self.head(self.b(y).movedim(self.channels, 1).flatten(2).mean(2))


@pytest.mark.parametrize("kind", ["1x1", "3x3", "tokens"])
@pytest.mark.parametrize("rare", [False, True])
def test_kfac_says_what_the_outputs_lose(kind: str, rare: bool) -> None:
    """A channel that is its mean everywhere changes the outputs by as much as its score says, though
    positions are pooled (their changes add up, not the squares of these), and though a channel is on in a few
    samples only."""
    torch.manual_seed(0)
    model = Pooled(kind).eval()
    data = []
    for _ in range(12):
        each = torch.randn(500, 6, 1) * (
            torch.rand(500, 6, 1) < (0.05 if rare else 1.0)
        )  # the same at all positions of a sample
        x = each + 0.1 * torch.randn(500, 6, 36)
        data.append(x.transpose(1, 2) if kind == "tokens" else x.unflatten(2, (6, 6)))
    with torch.no_grad():  # channels that tell nothing of each other: no refit helps
        middle = int(kind == "3x3")
        weight = model.a.weight.zero_() if kind == "tokens" else model.a.weight.zero_()[:, :, middle, middle]
        weight += torch.diag(torch.tensor([1.0, 0.3, 2.0, 0.7, 1.5, 0.5]))
    surgery = surgeon.inspect(model, data[0][:2])
    (group,) = (g for g in surgery.groups if g.name == "a.weight[0]")
    kfac = ready(criteria.KFAC(damping=1e-6, stepwise=0), surgery, data)
    found = criteria.scores(kfac, group, surgery.graph.tensors).ravel()
    want = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for x in data:
            hidden = model.a(x)
            for unit in range(6):
                everywhere = torch.cat(
                    [model.a(b).select(model.channels, unit).flatten() for b in data]
                ).mean()
                cut = hidden.index_fill(model.channels, torch.tensor(unit), everywhere)
                want[unit] += (model.rest(cut) - model(x)).double().square().sum()
    check(found, want, 0.1)
    (factors,) = (r.statistics.curvature.estimated for r in kfac.evidence.of(group))
    assert (want / factors.ravel() > 3).all(), "the factors alone are wrong by far"


def test_kfac_of_queries() -> None:
    """No weight reads them: what zeros do to first order, a sample's tokens together."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.q(x), x)

        def rest(self, q: Tensor, x: Tensor) -> Tensor:
            return (q @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)

    torch.manual_seed(0)
    model = Attend()
    data = [torch.randn(7, 5, 6) for _ in range(2)]
    surgery = surgeon.inspect(model, data[0])
    group = next(g for g in surgery.groups if any(m.tensor == "q.weight" for m in g.members))
    found = criteria.scores(ready("kfac", surgery, data), group, surgery.graph.tensors).ravel()
    want = torch.zeros(4, dtype=torch.float64)
    for number, x in enumerate(data, 1):
        q = model.q(x).detach().requires_grad_()
        out = model.rest(q, x)
        signs = torch.randint(0, 2, out.shape, generator=torch.Generator().manual_seed(number)) * 2 - 1
        (gradient,) = torch.autograd.grad((out * signs).sum(), q)
        want += (q.detach() * gradient).double().sum(1).square().sum(0)
    check(found, want, 1e-4)


def test_kfac_of_a_result_that_nothing_reads() -> None:
    """As the last residual of a WaveNet: the layer that makes it weighs nothing, the others count as ever."""

    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unread = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            self.unread(y)
            return self.b(y)

    torch.manual_seed(0)
    model = Unread()
    x = torch.randn(50, 6)
    surgery = surgeon.inspect(model, x)
    group = next(g for g in surgery.groups if g.name.startswith("a."))
    found = criteria.scores(ready("kfac", surgery, [x]), group, surgery.graph.tensors)
    del model.unread
    model.unread = nn.Identity()
    surgery = surgeon.inspect(model, x)
    alone = criteria.scores(ready("kfac", surgery, [x]), surgery.groups[0], surgery.graph.tensors)
    np.testing.assert_allclose(found, alone, rtol=1e-9)
    assert alone.max() > 0


def test_kfac_needs_no_labels() -> None:
    """Without a loss, outputs times random signs, others for each batch."""
    model = made(Pointwise)
    data = batches((64,) * 40)
    found = ready("kfac", surgeon.inspect(model, X), data).evidence
    curvatures = [s.curvature for s in found.statistics]
    (sensitivity,) = [
        c.sensitivity
        for c in curvatures
        if c is not None and c.weight is not None and c.weight.shape == (1, 8, 5)
    ]
    want = torch.zeros(5, dtype=torch.float64)
    for number, x in enumerate(data, 1):
        y, out = read_and_output(model, x)
        want += squared_gradient(output_probe(out, generator=torch.Generator().manual_seed(number)), y)
    np.testing.assert_allclose(sensitivity.ravel().numpy(), want.numpy(), rtol=1e-5)


def read_and_output(model: Pointwise, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.b(model.a(x).relu()).detach().requires_grad_()
    return y, model.head(y.relu().mean((2, 3)))


def squared_gradient(value: Tensor, y: Tensor) -> Tensor:
    gradient = torch.autograd.grad(value, y, retain_graph=True)[0]
    return gradient.double().square().sum((0, 2, 3))


def test_the_mean_over_signs_is_the_sum_over_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    y, out = read_and_output(made(Pointwise), X[:1])
    means = torch.zeros(5, dtype=torch.float64)
    for signs in itertools.product((0, 1), repeat=4):
        monkeypatch.setattr(torch, "randint", lambda *_, drawn=signs, **__: torch.tensor([drawn]))
        means += squared_gradient(output_probe(out, generator=torch.Generator()), y) / 16
    want = torch.stack([squared_gradient(out[:, j].sum(), y) for j in range(4)]).sum(0)
    np.testing.assert_allclose(means.numpy(), want.numpy(), rtol=1e-5)


def test_a_knapsack_of_scores_that_add_up() -> None:
    """The least sum of scores within the budget, over all choices."""
    model, data = made(Grouped), batches((6,) * 3)
    surgery = surgeon.inspect(model, X)
    kfac = ready("kfac", surgery, data)
    plan = surgery.plan(macs=0.6, criterion=kfac, scope="knapsack", round_to=1)
    scores = {g.name: criteria.scores(kfac, g, surgery.graph.tensors) for g in surgery.groups}

    def lost(kept: Any) -> float:
        gone = 0.0
        for group in (g for g in surgery.groups if g.kind == "columns"):  # rows are their alternative
            first = group.members[0]
            stays = kept.get(first.tensor, {}).get(first.dim)
            if stays is not None:
                gone += sum(
                    float(scores[group.name].ravel()[u])
                    for i, u in zip(first.index, first.unit, strict=True)
                    if i not in stays
                )
        return gone

    uniform = surgery.plan(macs=0.6, criterion=kfac, round_to=1)
    spread = surgery.plan(macs=0.6, criterion=kfac, scope="global", round_to=1)
    assert lost(plan.kept) <= min(lost(uniform.kept), lost(spread.kept)) * (1 + 1e-9)
    assert plan.macs <= 0.6 * surgery.macs


def test_grouped_and_depthwise_convolutions() -> None:
    """Entries of a grouped convolution meet their own group's weights; a depthwise one mixes nothing, so its
    reader counts.
    """
    model, data = made(Grouped), batches((3, 2))
    surgery = surgeon.inspect(model, X)
    groups = {g.name: g for g in surgery.groups}
    assert {"a.weight[0] rows", "a.weight[0] columns"} <= set(groups)
    found = scored(criteria.Variance(normalize=None), surgery, data)
    x, weight = per_channel(read(model, "b", data)), model.b.weight.detach().double()  # [8, 6, 3, 3]
    norms = torch.cat([weight[4 * g : 4 * g + 4].square().sum((0, 2, 3)) for g in range(2)])
    entries = x.var(0, correction=0) * norms
    check(found["a.weight[0] columns"], by_unit(groups["a.weight[0] columns"], "a.weight", entries))
    own = per_channel(read(model, "c", data)).var(
        0, correction=0
    ) * model.c.weight.detach().double().square().sum((0, 2, 3))
    rows = groups["a.weight[0] rows"]
    check(
        found["a.weight[0] rows"],
        (by_unit(rows, "a.weight", entries) + by_unit(rows, "d.weight", own)) / 2 if touches(rows, "d.weight")
        else by_unit(rows, "a.weight", entries),
    )  # fmt: skip
    obs = scored(criteria.OBS(normalize=None), surgery, data)["a.weight[0] columns"]
    want = torch.zeros(12, dtype=torch.float64)
    for g in range(2):
        part = x[:, 6 * g : 6 * g + 6]
        hessian = part.T @ part / len(part)
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(6)
        want[6 * g : 6 * g + 6] = norms[6 * g : 6 * g + 6] / torch.linalg.inv(hessian).diagonal()
    check(obs, by_unit(groups["a.weight[0] columns"], "a.weight", want))


def touches(group: Group, tensor: str) -> bool:
    return any(m.tensor == tensor for m in group.members)


def by_unit(group: Group, tensor: str, values: Tensor) -> Tensor:
    member = next(m for m in group.members if m.tensor == tensor and m.dim == 0)
    found = torch.zeros(group.units, dtype=torch.float64)
    return found.index_add(0, torch.from_numpy(member.unit), values[torch.from_numpy(member.index)])


@pytest.mark.parametrize("kind", ["linear", "matmul", "mm", "left", "transposed"])
def test_weights_are_read_whichever_way_they_lie(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 3))
            if kind == "transposed":
                self.t = nn.ConvTranspose1d(6, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if kind == "linear":
                return nn.functional.linear(y, self.w.T)
            if kind == "matmul":
                return y[:, None] @ self.w
            if kind == "left":
                return self.w.T @ y.T
            if kind == "transposed":
                return self.t(y[..., None])
            return torch.mm(y, self.w)

    model = made(Two)
    if kind == "transposed":
        with torch.no_grad():
            model.t.weight.copy_(model.w[..., None])
    data = batches((5, 3), (4,))
    found = scored("variance", surgeon.inspect(model, torch.randn(2, 4)), data)["a.weight[0]"]
    y = model.a(torch.cat(data)).detach().double()
    check(found, relative(y.var(0, correction=0) * model.w.detach().double().square().sum(1)))


def test_queries_and_keys_are_each_others_weights() -> None:
    """No weight reads queries: a dim counts by what its products with the keys add to the scores."""
    model, shape = made(SeparateQKV), (7, 5)
    data = batches((3, 2), shape)
    surgery = surgeon.inspect(model, torch.randn(1, *shape))
    columns = next(g for g in surgery.groups if g.kind == "columns")
    found = ready(criteria.Variance(normalize=None), surgery, data)(columns, surgery.graph.tensors)
    x = torch.cat(data)
    q, k = (layer(x).detach().double().reshape(-1, 24) for layer in (model.q, model.k))
    members = {m.tensor: m for m in columns.members}
    checked = 0
    for name, want in (("q.weight", q.var(0, correction=0) * k.square().mean(0)), ("v.weight", None)):
        member = members[name]
        if want is None:
            v = read(model, "o", data).reshape(-1, 24)
            want = v.var(0, correction=0) * model.o.weight.detach().double().square().sum(0)
        for index, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
            np.testing.assert_allclose(found[unit], want[index], rtol=1e-5)
            checked += 1
    assert checked == 48


def test_heads_of_keys_serve_several_of_queries() -> None:
    model, shape = made(GroupedQueries), (7, 5)
    surgery = surgeon.inspect(model, torch.randn(1, *shape))
    (x,) = data = batches((5,), shape)
    found = ready(criteria.Variance(normalize=None), surgery, data)
    q, k = model.q(x).detach().double().reshape(-1, 6, 4), model.k(x).detach().double().reshape(-1, 3, 4)
    want = (q.var(0, correction=0) * k.square().mean(0).repeat_interleave(2, 0)).flatten()
    columns = next(g for g in surgery.groups if g.kind == "columns")
    member = next(m for m in columns.members if m.tensor == "q.weight")
    scores = torch.zeros(columns.units, dtype=torch.float64)
    scores.index_add_(0, torch.from_numpy(member.unit), want[torch.from_numpy(member.index)])
    touched = np.unique(member.unit)
    check(found(columns, surgery.graph.tensors)[touched], scores[touched])


@pytest.mark.parametrize("computed", [True, False])
def test_attention_with_a_learnt_mask(computed: bool) -> None:
    """A computed mask's gradient needs another kernel than the recorded one, of many ops; what comes after is
    still found.
    """

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mask, self.o = nn.Linear(5, 12), nn.Parameter(torch.randn(7, 7)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            mask = self.mask * 2 if computed else self.mask
            return self.o(nn.functional.scaled_dot_product_attention(q, k, value=v, attn_mask=mask)[:, 0])

    model = made(Masked)
    surgery = surgeon.inspect(model, torch.randn(1, 7, 5))
    (x,) = data = batches((3,), (7, 5))
    found = ready(criteria.TaylorActivation(normalize=None), surgery, data)
    seen: list[Tensor] = []
    model.o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model(x)
    seen[0].retain_grad()
    output_energy(output).backward()
    want = (
        (seen[0] * seen[0].grad).flatten(0, 1).abs().mean(0)
    )  # rows of a linear layer of three dims are samples
    for group in surgery.groups:
        for m in group.members:
            if m.tensor == "o.weight":
                check(found(group, surgery.graph.tensors)[m.unit], want[torch.from_numpy(m.index)])
                return
    raise AssertionError("no group of the output projection")


@pytest.mark.parametrize("kind", [SeparateQKV, GroupedQueries, MultiHead], ids=lambda k: k.__name__)
@pytest.mark.parametrize("name", sorted(set(FROM_DATA) - {"hrank"}))
def test_attention_can_be_cut_by_every_criterion(kind: Any, name: str) -> None:
    model, x = made(kind), torch.randn(1, 7, 5)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, criterion=ready(name, surgery, batches((3, 2), (7, 5))))
    small = plan.apply(model)
    assert surgeon.verify(model, small, plan, x).error < 1e-9


# -- from weights --------------------------------------------------------------------------------------------


def test_norms_by_option() -> None:
    model = made(Net)
    surgery = surgeon.inspect(model, X)
    own, next_ = (
        model.a.weight.detach().double().flatten(1),
        model.b.weight.detach().double().transpose(0, 1).flatten(1),
    )
    for p in (0.5, 1, 2, 3.5):
        a, b = (x.abs().pow(p).sum(1) ** (1 / p) for x in (own, next_))
        for normalize, scale in {
            "mean": torch.mean,
            "max": torch.max,
            "sum": torch.sum,
            None: torch.ones_like,
        }.items():
            parts = torch.stack([a / scale(a), b / scale(b)])
            want = {"mean": parts.mean(0), "sum": parts.sum(0), "max": parts.max(0).values, "first": parts[0]}
            for combine, score in want.items():
                found = scored(criteria.Norm(p=p, combine=combine, normalize=normalize), surgery)
                check(found["a.weight[0]"], score)
    np.testing.assert_array_equal(
        scored(criteria.Norm(2), surgery)["a.weight[0]"], scored("l2", surgery)["a.weight[0]"]
    )


def test_lamp_by_hand() -> None:
    model = made(Net)
    own, next_ = model.a.weight.detach().flatten(1), model.b.weight.detach().transpose(0, 1).flatten(1)
    size = (own.double().square().sum(1) + next_.double().square().sum(1)) / 2
    want = torch.stack([s / size[size >= s].sum() for s in size])
    check(scored("lamp", surgeon.inspect(model, X))["a.weight[0]"], want)


def test_fpgm_against_distances() -> None:
    model = made(Net)
    found = scored("fpgm", surgeon.inspect(model, X))
    of_a = [model.a.weight.detach().flatten(1), model.b.weight.detach().transpose(0, 1).flatten(1)]
    of_b = [
        model.b.weight.detach().flatten(1),
        model.head.weight.detach().reshape(4, 5, 9).transpose(0, 1).flatten(1),
    ]
    for name, slots in (("a.weight[0]", of_a), ("b.weight[0]", of_b)):
        parts = [relative(torch.cdist(w.double(), w.double()).sum(1)) for w in slots]
        check(found[name], torch.stack(parts).mean(0))


def test_an_object_remembers_no_weights() -> None:
    model = made(Net)
    surgery = surgeon.inspect(model, X)
    norm = criteria.Norm(1)
    first = scored(norm, surgery)["a.weight[0]"]
    with torch.no_grad():
        model.a.weight[0] *= 10
    again = scored(norm, surgery)["a.weight[0]"]
    np.testing.assert_array_equal(again, scored("l1", surgery)["a.weight[0]"])
    assert again[0] > first[0]


# -- the pass over data --------------------------------------------------------------------------------------


def test_a_mode_sees_the_tensors_that_autograd_tracks() -> None:
    seen: list[Tensor] = []

    class Mode(PlainMode):
        def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if "convolution" in str(func):
                seen.append(args[0])
            return func(*args, **kwargs)

    conv = nn.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 6, 6, requires_grad=True) * 1.0
    with Mode():
        out = conv(x)
    assert seen[0] is x
    assert torch.autograd.grad(out.sum(), seen)[0].abs().sum() > 0


class Counting(Net):
    """Counts its runs in a buffer, even in eval mode, caches, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.cache["last"] = x
        return super().forward(x + 0 * torch.randn(1))


@pytest.mark.parametrize("name", sorted(FROM_DATA))
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = made(Counting)
    surgery = surgeon.inspect(model, X)
    model.train()
    model.n.eval()
    model.a.weight.requires_grad_(False)
    model.b.weight.grad = torch.full_like(model.b.weight, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    model.cache.clear()
    torch.manual_seed(5)
    scored(name, surgery, batches((3, 3)))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not model.cache
    assert (model.a.weight.requires_grad, model.b.weight.requires_grad) == (False, True)
    assert model.a.weight.grad is None
    assert model.head.weight.grad is None
    assert (model.b.weight.grad == 3).all()
    assert torch.is_grad_enabled()


def test_frozen_weights_still_have_a_say() -> None:
    """requires_grad=False stops training, not the evidence."""
    model = made(Net)
    surgery, data = surgeon.inspect(model, X), batches((4,))
    want = scored("fisher", surgery, data)["a.weight[0]"]
    for p in model.parameters():
        p.requires_grad_(False)
    np.testing.assert_array_equal(scored("fisher", surgery, data)["a.weight[0]"], want)
    with torch.no_grad(), torch.inference_mode():
        np.testing.assert_array_equal(scored("fisher", surgery, data)["a.weight[0]"], want)


@pytest.mark.parametrize("name", ["variance", "taylor", "taylor_activation"])
def test_tuples_dicts_and_pairs(name: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x + shift)}

    model = made(Sum)
    surgery = surgeon.inspect(model, (X, torch.zeros(1)))
    inputs = [(x, torch.full((1,), 0.5)) for x in batches((2, 3))]
    want = scored(name, surgery, inputs)
    named = [{"x": x, "shift": s} for x, s in inputs]
    pairs = [(i, None) for i in inputs]
    for data, loss in ((named, None), (pairs, lambda out, _: output_energy(out))):
        for group, score in scored(name, surgery, iter(data), loss=loss).items():
            np.testing.assert_allclose(score, want[group])


def test_no_bar_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    scored("variance", surgeon.inspect(made(Net), X), batches((2,)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "which",
    [
        criteria.OBS(normalize=None),
        criteria.Variance(normalize=None),
        criteria.Taylor(),
        criteria.Fisher(normalize=None),
    ],
)
def test_a_part_of_a_group_scores_as_in_the_whole(which: Any) -> None:
    """Evidence is kept by atom, so it fits groups of which some channels were told to stay."""
    surgery = surgeon.inspect(made(Net), X)
    found, whole = ready(which, surgery, batches((9,))), surgery.groups[1]
    stays = np.array([1, 3, 4])
    number = np.full(whole.units, -1)
    number[stays] = np.arange(3)
    members = []
    for m in whole.members:
        inside = number[m.unit] >= 0
        members.append(dataclasses.replace(m, index=m.index[inside], unit=number[m.unit[inside]]))
    part = dataclasses.replace(
        whole, sets=whole.sets[:, stays], strata=whole.strata[:, stays], members=tuple(members)
    )
    tensors = surgery.graph.tensors
    np.testing.assert_allclose(found(part, tensors), found(whole, tensors)[stays])


def test_a_plan_takes_the_lowest_scores() -> None:
    model = made(Net)
    surgery, data = surgeon.inspect(model, X), batches((9,))
    plan = surgery.plan(0.5, criterion=ready("obs", surgery, data), round_to=1)
    order = np.argsort(scored("obs", surgery, data)["a.weight[0]"])
    assert plan.kept["a.weight"][0] == sorted(order[4:].tolist())


def test_the_docs_list_every_criterion_with_its_paper() -> None:
    text = (Path(__file__).parents[2] / "docs" / "criteria.md").read_text()
    for name, make in criteria.BUILT_IN.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        if name in ("first", "random"):
            continue
        found: Any = make(0)
        assert f"`{type(found).__name__}(" in row
        year = re.compile(r"\b(19|20)\d\d\b")
        assert year.search(type(found).__doc__ or ""), name
        assert year.search(row) or row.split("|")[-2].strip() == "the same", name
        defaults = (found.combine, found.normalize)
        others = {
            "taylor": ("sum", None),
            "obs": ("sum", "mean"),
            "kfac": ("sum", None),
            "bn_scale": ("mean", None),
            "lamp": ("mean", None),
        }
        assert defaults == others.get(name, ("mean", "mean"))


# -- what may go wrong ---------------------------------------------------------------------------------------


def refused(
    which: Any, data: Any, match: str, kind: Callable[[], nn.Module] = Net, x: Any = X, **options: Any
) -> None:
    surgery = surgeon.inspect(made(kind), x)
    with pytest.raises(InputError, match=match):
        scored(which, surgery, data, **options)


def endless() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize("name", sorted(FROM_DATA))
def test_criteria_that_need_data_ask_for_it(name: str) -> None:
    refused(name, None, r"looks at data[\s\S]*data=")
    refused(name, endless(), "no batch")
    surgery = surgeon.inspect(made(Net), X)
    with pytest.raises(InputError, match=r"looks at data[\s\S]*data="):
        surgery.plan(0.5, criterion=criteria.criterion(name))


def test_unknown_names_and_options() -> None:
    refused("tailor", [], "kfac, obs, taylor, taylor_activation, variance")
    for make in (
        lambda: criteria.Norm(combine="median"),
        lambda: criteria.Norm(normalize="gaussian"),
        lambda: criteria.Norm(p=0),
        lambda: criteria.OBS(damping=0),
        lambda: criteria.Entropy(bins=1),
    ):
        with pytest.raises(InputError):
            make()


def test_bad_data() -> None:
    good = batches((2, 2))
    refused("variance", X, "iterable of batches")
    refused("variance", 3, "iterable of batches")
    refused("variance", [*good, "text"], "batch 3 of the data cannot be used")
    refused("variance", [good[0], torch.full((2, 3, 6, 6), torch.nan)], "batch 2 of the data cannot be used")
    refused("variance", [good[0], torch.full((2, 3, 6, 6), 1e38)], "batch 2 of the data gives activations")
    refused("variance", labelled(good), "does not run on batch 1[\\s\\S]*pass loss=")
    refused("variance", good, "batch 1 of the data is no pair", loss=nn.CrossEntropyLoss())
    refused("entropy", [X], "two samples")


def test_bad_losses() -> None:
    pairs = labelled(batches((2, 2, 2)))
    calls = []

    def breaks(output: Tensor, _: Tensor) -> Tensor:
        calls.append(1)
        return output.sum() * (torch.inf if len(calls) == 2 else 1)

    refused("taylor", pairs, "loss of batch 2 of the data is -?inf", loss=breaks)
    refused("fisher", pairs, "shape \\(2, 4\\)", loss=lambda output, _: output)
    refused("fisher", pairs, "a float", loss=lambda output, _: output.sum().item())
    refused("fisher", pairs, "without a gradient", loss=lambda output, _: output.sum().detach())
    refused(
        "fisher",
        pairs,
        "the loss fails on batch 1[\\s\\S]*loss\\(output, targets\\)",
        loss=lambda output: output,
    )
    refused(
        "taylor",
        pairs,
        "a gradient of batch 1",
        loss=lambda output, _: (output - output.detach()).abs().sqrt().sum(),
    )


def test_another_path_names_the_batch_and_the_op() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sigmoid() if x.mean() > 1 else x)

    class Stops(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if x.mean() > 1 else out.softmax(1)

    class Loops(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Loops, self).forward(item[None]) for item in x])

    class Swaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 1) for i, o in ((3, 6), (3, 6), (6, 2), (6, 2)))

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.a(x), self.b(x)
            return self.c(y) + self.d(z) if len(x) == 1 else self.d(z).add(self.c(y)).neg().neg()

    first, other = batches((2, 2))
    data = [first, other + 3]
    refused("variance", [X, first], r"batch 2 of the data takes another path[\s\S]*other products", Swaps)
    refused(
        "variance", data, r"batch 2 of the data takes another path[\s\S]*convolution[\s\S]*sigmoid", Branches
    )
    refused("variance", data, r"batch 2 of the data takes another path[\s\S]*softmax[\s\S]*ended", Stops)
    refused(
        "variance",
        [X, first],
        r"batch 2 of the data takes another path[\s\S]*op 11: aten.cat[\s\S]*4 products[\s\S]*2 did",
        Loops,
    )
    surgery = surgeon.inspect(made(Branches), X)
    assert scored("taylor", surgery, data)  # gradients of parameters need no path


def test_a_batch_may_run_other_ops_in_the_same_layers() -> None:
    """Several samples in sequence-first attention, and a branch on the batch size, against the same run one
    by one.
    """

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MultiHead()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x if len(x) == 1 else x + torch.zeros(5))  # more ids, so all others move

    for kind in (MultiHead, Sized):
        model = made(kind)
        surgery = surgeon.inspect(model, torch.randn(1, 7, 5))
        (data,) = batches((6,), (7, 5))
        for name in ("variance", "activation_mean", "obs"):
            want = scored(name, surgery, data.split(1))
            for group, score in scored(name, surgery, [data[:4], data[4:]]).items():
                np.testing.assert_allclose(score, want[group], rtol=1e-3)
                assert score.std() > 0


def test_groups_that_nothing_fit_reads() -> None:
    refused(
        "hrank",
        batches((3, 2), (7, 5)),
        r"hrank[\s\S]*rows[\s\S]*variance",
        SeparateQKV,
        torch.randn(1, 7, 5),
    )
    refused(criteria.OBS(widest=20), batches((4,)), r"45 x 45[\s\S]*OBS\(widest=45\)")
    refused(criteria.KFAC(widest=20), batches((4,)), r"45 x 45[\s\S]*KFAC\(widest=45\)")


def test_endless_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["surgeon.criteria.data.gather"], "_LIMIT", 100)
    refused("variance", itertools.repeat(batches((30,))[0]), "more than 100 samples")

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 6), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + self.a(x).sum(1, keepdim=True)

    refused(
        "variance",
        batches((3,), (4,)),
        r"reads 6 of these 6 units[\s\S]*a.weight",
        Vectors,
        torch.randn(2, 4),
    )


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = Net()
    surgery = surgeon.inspect(model, X.to("meta"))
    with pytest.raises(InputError, match="no values"):
        scored("variance", surgery, [X])
