"""Fine-tuning against its formulas, its promises (resume, seeds, what is kept), and bad input."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import surgeon
from surgeon.errors import InputError, MissingExtraError
from surgeon.training import (
    Average,
    Distillation,
    Features,
    accuracy,
    blocks,
    clip_adaptive,
    clip_norm,
    clip_value,
    soft_targets,
)
from surgeon.training.checkpoints import load_checkpoint, save_checkpoint
from surgeon.training.optimization import constant, cosine, step

G = torch.Generator().manual_seed(5)
X, Y = torch.randn(48, 6, generator=G), torch.randint(0, 4, (48,), generator=G)
PAIRS = list(zip(X.split(8), Y.split(8), strict=True))


class Net(nn.Module):
    """Dropout and batch norm: what is random and what is kept beside the weights."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, width)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.b(self.n(self.a(x)).relu()).relu()))


def made(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def same(left: nn.Module, right: nn.Module) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in left.state_dict().items())


# -- the parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((5, 7), 1), ((2, 7, 3, 3), 1), ((2, 3, 7), -1)])
def test_soft_targets_against_the_formula(temperature: float, shape: tuple[int, ...], dim: int) -> None:
    """T^2 * mean over positions of sum_c p_c (log p_c - log q_c), in plain loops."""
    ours, theirs = torch.randn(shape, generator=G), torch.randn(shape, generator=G)
    total, rows = 0.0, 0
    for q, p in zip(
        ours.movedim(dim, -1).reshape(-1, 7).tolist(),
        theirs.movedim(dim, -1).reshape(-1, 7).tolist(),
        strict=True,
    ):
        zp, zq = (sum(math.exp(v / temperature) for v in row) for row in (p, q))
        total += sum(
            math.exp(b / temperature) / zp * ((b - a) / temperature - math.log(zp) + math.log(zq))
            for a, b in zip(q, p, strict=True)
        )
        rows += 1
    assert soft_targets(ours, theirs, temperature, dim).item() == pytest.approx(
        temperature**2 * total / rows, rel=1e-5
    )


def parameters() -> list[nn.Parameter]:
    shapes: list[tuple[int, ...]] = [(3, 4), (5, 2, 3, 3), (6,), (2, 2)]
    found = [nn.Parameter(torch.randn(shape, generator=G)) for shape in shapes]
    for parameter in found[:3]:
        parameter.grad = torch.randn(parameter.shape, generator=G)
    with torch.no_grad():
        found[0][1] = 0  # a unit of no size: the least size counts
        found[0].grad[2] *= 1e-4  # a unit with a small gradient stays as it is
    return found


def test_adaptive_clipping_unit_by_unit() -> None:
    found = parameters()
    want = [p.grad.clone() for p in found[:3]]
    limited = 0
    for parameter, gradient in zip(found[:2], want[:2], strict=True):
        for unit in range(len(parameter)):
            size, most = gradient[unit].norm().item(), 0.05 * max(parameter[unit].norm().item(), 1e-3)
            if size > most:
                gradient[unit] *= most / size
                limited += 1
    want[2] *= 0.05 * found[2].norm().item() / want[2].norm().item()
    clip_adaptive(found, 0.05)
    for parameter, gradient in zip(found[:3], want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert limited == 7 and found[3].grad is None


def test_clipping_by_norm_and_value() -> None:
    found = parameters()
    before = [p.grad.clone() for p in found[:3]]
    size = math.sqrt(sum(float(g.square().sum()) for g in before))
    clip_norm(found, 0.5)
    for parameter, gradient in zip(found[:3], before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * (0.5 / size), rtol=1e-4, atol=1e-7)
    found = parameters()
    before = [p.grad.clone() for p in found[:3]]
    clip_value(found, 0.3)
    for parameter, gradient in zip(found[:3], before, strict=True):
        assert torch.equal(parameter.grad, gradient.clamp(-0.3, 0.3))


def test_schedules_against_closed_forms() -> None:
    rule = cosine(110, warmup=10, final=0.1)
    assert [rule(0), rule(4), rule(9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert [rule(10), rule(60), rule(110), rule(200)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert rule(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    drops = step(100)
    assert [drops(0), drops(49), drops(50), drops(74), drops(75), drops(99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [constant(9, warmup=1)(i) for i in range(3)] == [0.5, 1, 1]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(4))
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])


def test_the_moving_average_against_its_recursion() -> None:
    model = made()
    average = Average(model, 0.5)
    want = model.a.weight.detach().clone()
    for number in range(1, 13):
        with torch.no_grad():
            model.a.weight.normal_()
        model.n.num_batches_tracked += 1
        average.update(model)
        decay = min(0.5, (1 + number) / (10 + number))
        want = decay * want + (1 - decay) * model.a.weight.detach()
    torch.testing.assert_close(average.values["a.weight"], want)
    assert int(average.values["n.num_batches_tracked"]) == 12
    own = copy.deepcopy(model)
    with average.used_by(model):
        torch.testing.assert_close(model.a.weight, want)
    assert same(model, own)


# -- the whole -----------------------------------------------------------------------------------------------


def by_hand(model: Net, epochs: int, teacher: Net | None = None, frozen: bool = False) -> None:
    """What finetune does with its default settings, as a plain loop (no dropout)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    model.train(not frozen)
    for epoch in range(epochs):
        for place, (x, y) in enumerate(PAIRS):
            for group in optimizer.param_groups:
                group["lr"] = (
                    1e-2 * (1 + math.cos(math.pi * (epoch * len(PAIRS) + place) / (epochs * len(PAIRS)))) / 2
                )
            output = model(x)
            loss = F.cross_entropy(output, y)
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(x)
                loss = 0.3 * loss + 0.7 * soft_targets(output, theirs, 2.0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()


@pytest.mark.parametrize("taught", [False, True])
def test_against_a_plain_loop(taught: bool) -> None:
    plain, model, teacher = made(), made(), made(1).eval()
    for net in (plain, model):
        net.drop.p = 0.0
    by_hand(plain, 2, teacher if taught else None)
    teacher.train()  # finetune puts it in eval mode for the while
    more: dict[str, Any] = {"teacher": teacher, "distillation": Distillation(2.0, 0.7)} if taught else {}
    done = surgeon.finetune(model, PAIRS, epochs=2, rate=1e-2, clip=("norm", 0.1), **more)
    assert same(plain, model)
    assert done.model is model and not model.training and teacher.training
    assert [e.number for e in done.history] == [1, 2] and done.epoch == 2 and done.stopped == ""
    assert done.history[1].rate == pytest.approx(0, abs=1e-9)


def test_frozen_statistics_against_a_plain_loop() -> None:
    """Trained as in eval mode but for dropout; only scales and biases of the norm move; the modes are as
    after any training.
    """
    plain, model = made(), made()
    for net in (plain, model):
        net.drop.p = 0.0
        with torch.no_grad():
            net.n.running_mean += torch.arange(16.0) / 16
            net.n.running_var *= 2
    mean = model.n.running_mean.clone()
    by_hand(plain, 2, frozen=True)
    surgeon.finetune(
        model,
        PAIRS,
        epochs=2,
        rate=1e-2,
        clip=("norm", 0.1),
        frozen_statistics=True,
        evaluate=[PAIRS[0]],
        keep="last",
    )
    assert same(plain, model)
    assert torch.equal(model.n.running_mean, mean) and int(model.n.num_batches_tracked) == 0
    assert not torch.equal(model.n.weight, torch.ones(16))
    assert not any(module.training for module in model.modules())


def test_labels_are_not_needed_with_a_teacher() -> None:
    teacher, model = made(1), made()
    teacher.n.running_mean.normal_()
    done = surgeon.finetune(
        model, [x for x, _ in PAIRS], teacher=teacher, epochs=20, rate=1e-2, evaluate=None
    )
    assert done.history[-1].loss < done.history[0].loss / 2
    assert done.history[0].accuracy is None


def test_features_of_different_widths() -> None:
    """The loss is that of the kept channels, by hand; stage one moves the features alone."""
    torch.manual_seed(0)
    teacher = made(1).eval()
    surgery = surgeon.inspect(teacher, X[:2])
    plan = surgery.plan(0.5, round_to=1, criterion="random")
    small: Any = plan.apply(teacher).train()
    kept = plan.kept["b.weight"][0]
    features = Features(surgery, plan, ["b", "n"])
    assert features.kept["b"][1].tolist() == kept
    small.drop.p = 0.0
    with features.watching(small, teacher):
        small(X)
        with torch.no_grad():
            teacher(X)
        found = features.loss()
        ours = [small.n(small.a(X))]
        theirs = [teacher.n(teacher.a(X)).detach()]
        ours.append(small.b(ours[0].relu()))
        theirs = [theirs[0][:, plan.kept["n.weight"][0]], teacher.b(theirs[0].relu())[:, kept].detach()]
    want = sum(((s - t).square().mean() / t.square().mean() for s, t in zip(ours, theirs, strict=True)))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)

    head = small.head.weight.detach().clone()
    rule = Distillation(features=Features(surgery, plan, ["b"]), feature_epochs=1)
    sgd = lambda ps: torch.optim.SGD(ps, lr=0.1)  # noqa: E731
    done = surgeon.finetune(
        small, PAIRS, teacher=teacher, distillation=rule, epochs=1, optimizer=sgd, evaluate=PAIRS
    )
    assert torch.equal(small.head.weight, head)
    score = accuracy(small, PAIRS)
    surgeon.finetune(small, PAIRS, teacher=teacher, distillation=rule, epochs=2, optimizer=sgd)
    assert not torch.equal(small.head.weight, head)
    assert done.history[0].score == score


class Residual(nn.Module):
    """A block without weights of its own, and a module that lays channels and pixels out in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 12, 1), nn.Sequential(Added(), nn.ReLU())
        self.flat, self.head = nn.Flatten(), nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.block(self.stem(x))))


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_features_of_any_module() -> None:
    """What a module gives is cut like what reads it: a block's channels, and channels times pixels after a
    flatten.
    """
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 2, 2)
    surgery = surgeon.inspect(model, x)
    plan = surgery.plan(0.5, round_to=1, criterion="random")
    again = surgeon.Plan.from_json(plan.to_json())  # what a plan keeps is all that is known of it
    kept = Features(surgery, again, ["block", "block.0", "flat", "head"]).kept
    assert (
        kept["block"][1].tolist()
        == kept["block.0"][1].tolist()
        == plan.kept["stem.weight"][0]
        != list(range(6))
    )
    assert kept["flat"][1].tolist() == plan.kept["head.weight"][1]
    assert kept["head"] == {}


class Wrapped(nn.Module):
    """Gives its one tensor in a tuple, as transformer layers often do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Added()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class Tower(nn.Module):
    """Two blocks of one class in a list that is a module too, one that is twice one class inside, and a pair
    of values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 12, 1), nn.Sequential(Wrapped(), First(), Wrapped(), First())
        self.other, self.halves = nn.Sequential(Added(), Added()), nn.ModuleList([Halves(), Halves()])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.stage(self.stem(x)))
        for half in self.halves:
            x = torch.cat(half(x), 1)
        return self.head(x.mean((2, 3)))


class First(nn.Module):
    def forward(self, values: tuple[Tensor]) -> Tensor:
        return values[0]


class Halves(nn.Module):
    """Gives two values; what is inside of it gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Added()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(x)
        return x[:, :6], x[:, 6:]


def test_features_of_the_blocks() -> None:
    """By default all blocks are compared: the outermost modules of a class that occurs again, also through a
    tuple of one.
    """
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(2, 3, 2, 2)
    surgery = surgeon.inspect(model, x)
    assert blocks(surgery) == ["stage.0", "stage.2", "other.0", "other.1", "halves.0.inner", "halves.1.inner"]
    plan = surgery.plan(0.5, round_to=1, criterion="random")
    features, small = Features(surgery, plan), plan.apply(model)
    kept = plan.kept["stem.weight"][0]
    assert [index[1].tolist() for index in features.kept.values()] == [kept] * 6 != [list(range(12))] * 6
    with features.watching(small, model):
        small(x)
        with torch.no_grad():
            model(x)
        found = features.loss()
    streams: tuple[list[Tensor], list[Tensor]] = [], []
    for net, seen in zip((small, model), streams, strict=True):
        value = net.stem(x)
        for block in (
            net.stage[0].inner,
            net.stage[2].inner,
            *net.other,
            net.halves[0].inner,
            net.halves[1].inner,
        ):
            value = value + block.conv(value)
            seen.append(value.detach())
    pairs = [(ours, theirs[:, kept]) for ours, theirs in zip(*streams, strict=True)]
    want = sum(float((ours - theirs).square().mean() / theirs.square().mean()) for ours, theirs in pairs)
    assert float(found) == pytest.approx(want, rel=1e-5)


class AlignedRun(nn.Module):
    """Gives a second tensor that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Added()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y, y.mean()


def test_a_module_that_gives_two_tensors_has_no_features() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), AlignedRun(), First(), nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(2, 3, 2, 2)
    surgery = surgeon.inspect(model, x)
    features = Features(surgery, surgery.plan(0.0), ["1"])
    with (
        features.watching(model, model),
        pytest.raises(InputError, match="a AlignedRun gives 2 tensors in a tuple"),
    ):
        model(x)


def test_blocks_of_a_list_of_layers() -> None:
    """The layers with weights where no module with others inside occurs twice; a refusal where no layer
    does.
    """
    assert blocks(surgeon.inspect(made(), X[:2])) == ["a", "b", "head"]
    one = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(InputError, match="no two modules of one class"):
        blocks(surgeon.inspect(one, torch.randn(2, 1, 6)))


def test_what_is_kept() -> None:
    """The best weights by score, or the last; the average is what is scored and kept."""
    scores = iter([1.0, 3.0, 2.0, 2.5])
    seen: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        assert not model.training
        seen.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    model = made()
    done = surgeon.finetune(model, PAIRS, epochs=4, rate=1e-2, evaluate=score, average=0.9)
    assert done.epoch == 2
    assert all(torch.equal(value, seen[1][name]) for name, value in model.state_dict().items())
    scores = iter([1.0, 3.0, 2.0, 2.5])
    model = made()
    done = surgeon.finetune(model, PAIRS, epochs=4, rate=1e-2, evaluate=score, keep="last", patience=2)
    assert done.epoch == 4 and done.stopped == ""
    scores = iter([3.0, 1.0, 2.0, 2.5])
    done = surgeon.finetune(made(), PAIRS, epochs=9, rate=1e-2, evaluate=score, patience=2)
    assert (done.epoch, len(done.history)) == (1, 3) and "2 epochs" in done.stopped


def test_seeds() -> None:
    """The same seed gives the same weights, another one others; the caller's random numbers are not
    touched.
    """
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    found = []
    for seed in (1, 1, 2):
        model = made()
        torch.manual_seed(len(found))
        want = torch.rand(1, generator=torch.Generator().manual_seed(len(found)))
        surgeon.finetune(model, loader, epochs=2, rate=1e-2, seed=seed)
        assert torch.equal(torch.rand(1), want)
        found.append(model)
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_mixed_precision() -> None:
    """The products run in bfloat16, the weights stay float32; what the model was given back is the class's
    own forward.
    """
    dtypes = []
    model = made()
    model.head.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
    done = surgeon.finetune(model, PAIRS, epochs=4, rate=1e-2, precision="bf16")
    assert set(dtypes) == {torch.bfloat16} and model.head.weight.dtype == torch.float32
    assert done.history[-1].loss < done.history[0].loss and "forward" not in model.__dict__


def test_an_optimizer_that_went_through_the_cut() -> None:
    model = made()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    surgeon.finetune(model, PAIRS, epochs=2, optimizer=optimizer)
    small = surgeon.inspect(model, X[:2]).plan(0.5, round_to=1).apply(model, optimizer=optimizer)
    steps = optimizer.state[small.a.weight]["step"].item()
    done = surgeon.finetune(small, PAIRS, epochs=2, optimizer=optimizer)
    assert optimizer.state[small.a.weight]["step"].item() == steps + 2 * len(PAIRS) > steps > 0
    assert done.history[0].rate > 1e-3  # a fresh cosine from the base rate
    with pytest.raises(InputError, match="holds no parameter of the model"):
        surgeon.finetune(made(), PAIRS, epochs=1, optimizer=optimizer)


@pytest.mark.parametrize("kind", ["group_lasso", "l0"])
def test_a_regularizer(kind: str) -> None:
    """With a strong penalty units shrink, gates close; the optimizer knows the gates."""
    model = made()
    reg = surgeon.regularizer(surgeon.inspect(model, X[:2]), kind, 0.05)
    gates = [p.detach().clone() for p in reg.parameters()]
    size = model.b.weight.detach().norm()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=3e-2)
    surgeon.finetune(model, PAIRS, epochs=10, optimizer=optimizer, schedule="constant", regularizer=reg)
    if kind == "l0":
        assert all(bool((p < before).all()) for p, before in zip(reg.parameters(), gates, strict=True))
        assert len(optimizer.param_groups) == 2
    else:
        assert model.b.weight.norm() < size / 2


# -- resume --------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_finetune import settings
import surgeon
seen = 0
def die(model, args, output):
    global seen
    seen += model.training
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
model, options = settings(sys.argv[1], sys.argv[3])
model.register_forward_hook(die)
surgeon.finetune(model, **options)
"""


class Noisy:
    """Batches in random order, with random noise: what a loader with augmentation does."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for place in torch.randperm(len(PAIRS)).tolist():
            x, y = PAIRS[place]
            yield x + 0.1 * torch.randn(x.shape), y

    def __len__(self) -> int:
        return len(PAIRS)


def settings(checkpoint: str | None, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A run that has everything that a checkpoint must hold."""
    model = made()
    surgery = surgeon.inspect(model, X[:2])
    plan = surgery.plan(0.25, round_to=1)
    small = plan.apply(model)
    reg = surgeon.regularizer(surgeon.inspect(small, X[:2]), "l0", 1e-3)
    options = {
        "train": Noisy() if kind == "noisy" else DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), "epochs": 3,
        "rate": 1e-2, "teacher": model, "regularizer": reg, "average": 0.9, "evaluate": PAIRS, "checkpoint": checkpoint,
        "checkpoint_steps": 2 if checkpoint else None, "warmup": 3,
    }  # fmt: skip
    return small, options


@pytest.mark.parametrize(("at", "kind"), [(10, "noisy"), (16, "loader")])  # in the middle of epochs 2 and 3
def test_resume_after_kill_9(tmp_path: Path, at: int, kind: str) -> None:
    path = tmp_path / "run.ckpt"
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    paths = os.pathsep.join([str(Path(surgeon.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    died = subprocess.run(
        [sys.executable, str(script), str(path), str(at), kind], env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert [file.name for file in tmp_path.iterdir() if "ckpt" in file.name] == ["run.ckpt"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, options = settings(None, kind)
        uninterrupted = surgeon.finetune(whole, **options)
        model, options = settings(str(path), kind)
        forwards: list[int] = []
        model.register_forward_hook(lambda module, *_: forwards.append(1) if module.training else None)
        done = surgeon.finetune(model, **options)
    finally:
        torch.set_num_threads(threads)
    assert len(forwards) == 18 - (at - 1) // 2 * 2  # from the last checkpoint on, not from the start
    assert same(model, whole)
    assert done.history == uninterrupted.history and done.epoch == uninterrupted.epoch
    forwards.clear()
    again = surgeon.finetune(model, **options)  # a finished run is not run again
    assert not forwards and again.history == done.history and same(model, whole)


def test_checkpoints_of_others_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    model = made()
    plans = [
        surgeon.inspect(model, X[:2]).plan(0.5, round_to=1, criterion="random", seed=seed) for seed in (0, 1)
    ]
    small, other = (plan.apply(model) for plan in plans)
    surgeon.finetune(small, PAIRS, epochs=1, checkpoint=path)
    with pytest.raises(
        InputError, match=r"another model or run(?s:.*)plans: "
    ):  # same widths, other channels
        surgeon.finetune(other, PAIRS, epochs=1, checkpoint=path)
    with pytest.raises(InputError, match=r"another model or run(?s:.*)model: "):
        surgeon.finetune(model, PAIRS, epochs=1, checkpoint=path)
    for changed, words in [
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"rate": 0.1}, r"rates: \[0.001\] there, \[0.1\] here"),
        ({"schedule": "constant"}, "schedule at"),
        ({"frozen_statistics": True}, "frozen statistics: False there, True here"),
        (
            {"regularizer": surgeon.regularizer(surgeon.inspect(small, X[:2]), "l1", 0.1)},
            "regularizer: None there, 'L1' here",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            surgeon.finetune(small, PAIRS, epochs=1, checkpoint=path, **changed)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2] + b"!" + whole[len(whole) // 2 + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="the checkpoint is damaged"):
            surgeon.finetune(small, PAIRS, epochs=1, checkpoint=path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(InputError, match="no checkpoint"):
        surgeon.finetune(small, PAIRS, epochs=1, checkpoint=path)


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    """A checkpoint with a right checksum and a pickled call is refused, and the call is not made."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    save_checkpoint(tmp_path / "run.ckpt", {"x": Evil()}, {})
    with pytest.raises(InputError, match="cannot be loaded"):
        load_checkpoint(tmp_path / "run.ckpt", {})
    assert not (tmp_path / "made").exists()


# -- bad input -----------------------------------------------------------------------------------------------


class Endless:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield PAIRS[0]


class Once:
    """Says that it can be read again, and cannot."""

    def __init__(self) -> None:
        self.left = iter(PAIRS)

    def __iter__(self) -> Iterator[Any]:
        return self.left

    def __len__(self) -> int:
        return len(PAIRS)


BAD_X = [*PAIRS[:2], (torch.randn(8, 5), Y[:8])]
BAD_Y = [*PAIRS[:2], (X[:8], Y[:7])]
UNTRACKED = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
NAN = [*PAIRS[:3], (X[:8] * float("nan"), Y[:8])]


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        ([], {}, "train holds no batch"),
        (X, {}, "iterable of batches, got a Tensor"),
        (iter(PAIRS), {}, "iterator, which can be read only once"),
        (Endless(), {}, "no length(?s:.*)steps="),
        (Once(), {"epochs": 2}, "train gave 0 batches in epoch 2, 6 were announced"),
        (BAD_X, {}, r"does not run on batch 3 of epoch 1(?s:.*)\(8, 5\)"),
        (BAD_Y, {}, r"loss fails on batch 3 of epoch 1(?s:.*)output \(8, 4\)(?s:.*)output \(7,\)"),
        (NAN, {"epochs": 2}, "loss is nan at step 4 "),
        ([x for x, _ in PAIRS], {}, "batch 1 of epoch 1 has no targets(?s:.*)teacher"),
        (
            PAIRS,
            {"loss": lambda output, targets: output},
            r"loss of batch 1 of epoch 1 is a tensor of shape \(8, 4\)",
        ),
        (PAIRS, {"loss": lambda output, targets: output.detach().sum()}, "without a gradient"),
        (PAIRS, {"teacher": Net(classes=5)}, r"teacher's output has shape \(8, 5\), the student's \(8, 4\)"),
        (PAIRS, {"distillation": Distillation()}, "needs a teacher"),
        (PAIRS, {"clip": ("size", 1.0)}, "'norm'(?s:.*)'value'(?s:.*)'adaptive'"),
        (PAIRS, {"clip": ("norm", -1.0)}, "positive"),
        (PAIRS, {"schedule": "linear"}, "cosine, step, constant"),
        (PAIRS, {"warmup": 600}, "600 of 6 steps"),
        (PAIRS, {"keep": "first"}, "'best' or 'last'"),
        (PAIRS, {"patience": 3}, "need a score"),
        (PAIRS, {"keep": "best"}, "need a score"),
        (PAIRS, {"epochs": 0}, "epochs must be"),
        (PAIRS, {"rate": -1.0}, "rate must be"),
        (PAIRS, {"model": UNTRACKED, "frozen_statistics": True}, "no batch norm whose statistics"),
        (PAIRS, {"precision": "int8"}, "precision 'int8'"),
        (PAIRS, {"precision": "fp16"}, "'fp16' on GPUs"),
        (PAIRS, {"average": 1.0}, r"\[0, 1\)"),
        (PAIRS, {"optimizer": "adam"}, "optimizer is a str"),
        (PAIRS, {"evaluate": [(X, X)]}, "no accuracy can be computed of batch 1"),
        (PAIRS, {"evaluate": []}, "evaluate holds no batch"),
        (PAIRS, {"evaluate": lambda model: float("nan")}, "score after epoch 1 is nan"),
        (PAIRS, {"checkpoint_steps": 3}, "needs a file"),
        (
            PAIRS,
            {"regularizer": surgeon.regularizer(surgeon.inspect(Net(), X[:2]), "l1", 0.1)},
            "one of another model",
        ),
    ],
)
def test_bad_input(train: Any, options: dict[str, Any], words: str) -> None:
    if options.get("precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 works here")
    with pytest.raises(InputError, match=words):
        surgeon.finetune(**{"model": made(), "train": train, "epochs": 1, **options})


def test_steps_of_endless_data() -> None:
    done = surgeon.finetune(made(), Endless(), steps=5, epochs=2, rate=1e-2)
    assert len(done.history) == 2 and done.history[1].loss < done.history[0].loss


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"weight": 1.5}, {"feature_weight": -1.0}, {"feature_epochs": 1}]
)
def test_bad_distillation(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Distillation(**options)


def test_features_that_cannot_be() -> None:
    model = made()
    surgery = surgeon.inspect(model, X[:2])
    plan = surgery.plan(0.5, round_to=1)
    with pytest.raises(InputError, match="no module 'nowhere' ran"):
        Features(surgery, plan, ["nowhere"])
    with pytest.raises(InputError, match="list of names"):
        Features(surgery, plan, "b")


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"surgeon-torch\[train\]"):
        surgeon.finetune(made(), PAIRS, epochs=1)
