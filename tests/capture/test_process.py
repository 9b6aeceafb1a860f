"""A cut leaves the process and the original as they were, and does not care what the process is in."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from untouched import untouched

import surgeon
from surgeon.errors import CaptureError, ProofError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def cut(model: nn.Module, inputs: Any = X) -> nn.Module:
    return surgeon.shrink(model, 0.5, example_inputs=inputs, round_to=1)


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


class Cache:
    """A plain object of a model's."""

    def __init__(self) -> None:
        self.hits = 0
        self.seen: list[int] = []


class Writes(nn.Module):
    """Its forward writes into all that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, max_norm=1.0)
        self.inner, self.last = nn.Linear(16, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.zeros(3)
        self.listed = [torch.zeros(3)]
        self.nested: dict[str, list[Tensor]] = {"a": [torch.zeros(3)]}
        self.cache = Cache()
        self.recent: deque[int] = deque([1], maxlen=3)
        self.names = {"a"}
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(1)
        self.kept: dict[str, Tensor] = {}
        with torch.no_grad():
            self.embedding.weight.mul_(5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.plain.add_(1)
        self.plain[0] = 5.0
        self.listed[0].data.add_(1)
        self.nested["a"][0].mul_(0).sub_(1)
        self.nested["a"].append(x)
        self.nested["b"] = []
        self.cache.hits += 1
        self.cache.seen.append(2)
        self.recent.append(4)
        self.names.add("b")
        self.array += 1
        self.inner.weight.data = self.inner.weight.data * 2
        self.last.bias.data.clamp_(0, 0)
        noise = torch.rand(3, generator=self.generator) + random.random() + np.random.rand() + torch.rand(1)
        self.kept["x"] = x
        self.extra = noise
        return self.last(self.inner(self.embedding(x)).relu()) + 0 * noise


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_writes_leaves_no_trace(training: bool) -> None:
    model = Writes().train(training)
    model.inner.weight.grad = torch.ones_like(model.inner.weight)
    with untouched(model):
        surgery = surgeon.inspect(model, torch.arange(6)[None])
        plan = surgery.plan(0.5, round_to=1)
        small = plan.apply(model)
    assert small.inner.out_features == 4 and model.inner.out_features == 8


def test_a_backward_pass_that_waits_finds_the_weights_as_they_were() -> None:
    model = Writes()
    loss = F.linear(model.embedding.weight, model.inner.weight).sum()  # needs both weights
    with untouched(model):
        surgeon.inspect(model, torch.arange(6)[None])
    loss.backward()


class Draws(nn.Module):
    """Draws in every way that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + torch.randn_like(y) + torch.rand_like(y) + torch.rand(1) + torch.normal(0.0, 1.0, (1,))
        return self.last(y + torch.empty(1).uniform_() + torch.zeros(1).bernoulli_(0.5))


class DrawsNumbers(Draws):
    """Draws what the proof does not take for one number."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.randint(3, (8,)) + torch.randperm(8) + torch.multinomial(torch.ones(9), 8)
        return self.last(F.dropout(self.first(x), 0.5, training=True) + whole.float().mean())


def test_models_that_draw_advance_no_generator() -> None:
    for model, verify in ((Draws(), True), (DrawsNumbers(), False)):
        with untouched(model):
            small = surgeon.shrink(model, 0.5, example_inputs=torch.ones(2, 4), round_to=1, verify=verify)
        assert small.first.out_features == 4


class StartsTraining(nn.Module):
    """A wrapper whose `train` is no switch of modes, like those of detection libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()
        self.started = 0

    def train(self, data: Any = None, **options: Any) -> Any:  # type: ignore[override]
        self.started += 1
        raise RuntimeError("a training started")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Merges(Net):
    """Merges weights when it goes into eval mode, like layers of LoRA."""

    def train(self, mode: bool = True) -> Merges:
        if not mode and self.training:
            self.first.weight.data.add_(1)
        super().train(mode)
        return self


def test_train_is_never_called() -> None:
    model = StartsTraining()
    small = cut(model)
    assert model.started == 0 and small.model.first.out_channels == 4
    merges = Merges()
    with untouched(merges):
        cut(merges)


class Predicts(StartsTraining):
    """One that can only be asked for predictions, of images in files."""

    def forward(self, x: Tensor) -> Any:
        raise TypeError("the name of an image file is expected")


def test_the_advice_for_a_wrapper_names_the_model_in_it() -> None:
    with pytest.raises(CaptureError, match=r"pass its part model \(Net\)") as told:
        surgeon.inspect(Predicts(), X)
    assert "image file" in str(told.value)
    assert isinstance(told.value.__cause__, CaptureError)
    with pytest.raises(CaptureError) as plain:
        surgeon.inspect(Predicts().model, X[:, :2])  # the model itself
    assert "its part" not in str(plain.value)
    assert isinstance(plain.value.__cause__, RuntimeError), "the model's own error is there to be read"


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("name", WAYS)
def test_whatever_the_caller_is_in_the_cut_is_the_same(name: str) -> None:
    model, alone = net(), cut(net())
    with WAYS[name]():
        for _ in range(2):  # autocast keeps what it cast
            with untouched(model):
                plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
                small = plan.apply(model)
                proof = surgeon.verify(model, small, plan, X)
            assert proof.error < 1e-12
    assert_same(small, alone)
    small(X).sum().backward()


def test_a_default_device_is_put_back() -> None:
    model, alone = net(), cut(net())
    try:
        torch.set_default_device("meta")
        with untouched(model):
            assert_same(cut(model), alone)
    finally:
        torch.set_default_device(None)


def test_compiled_wrappers_are_cut_like_what_they_wrap() -> None:
    for wrapped in (
        torch.compile(net(), backend="eager"),
        nn.Sequential(torch.compile(net(), backend="eager")),
    ):
        with untouched(wrapped):
            small = cut(wrapped)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net().parameters())
        assert small(X).shape == (2, 4, 6, 6)


def test_a_proof_needs_values() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(ProofError, match=r"(?s)without values.*first.weight is on the meta device"):
        cut(model)


class MakesTensors(Net):
    """Its code makes tensors where the default device is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.arange(4.0).add(1).view(4, 1, 1)


def test_of_a_model_that_makes_tensors_the_default_device_counts() -> None:
    model = MakesTensors().eval()
    alone = cut(model)
    with torch.device("meta"):  # no values: the model's own device is taken instead
        assert_same(cut(model), alone)


class Constants(nn.Module):
    """Numbers that torch rounds to its default dtype, made in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        y = y / torch.tensor(7).sqrt() * torch.tensor([0.1]) + torch.full((1,), 0.3)
        steps = torch.arange(x.shape[1])[:, None]
        y = y * (steps / 10000) + torch.exp(steps * -0.1) + torch.linspace(0, 0.7, x.shape[1])[:, None]
        return self.last(y + torch.where(steps > 1, 0.1, 0.7) + torch.as_tensor(0.2) + 10000 ** (-steps / 3))


def test_the_default_dtype_stays_and_the_proof_is_as_exact() -> None:
    model, x = Constants().eval(), torch.randn(2, 3, 8)
    dtypes = []
    model.register_forward_hook(lambda *_: dtypes.append(torch.get_default_dtype()))
    plan = surgeon.inspect(model, x).plan(0.5, round_to=1)
    small = plan.apply(model)
    proof = surgeon.verify(model, small, plan, x)
    assert proof.error < 1e-12 and proof.compared >= 2
    small(x)
    assert set(dtypes) == {torch.float32}


def test_threads_disturb_each_other_neither_way() -> None:
    wanted = [cut(net(seed)) for seed in (1, 2)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = [torch.rand(4) for _ in range(400)]
    failed: list[BaseException] = []
    ready, done = threading.Barrier(3), threading.Event()

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                ready.wait()
                work()
            except BaseException as error:  # noqa: BLE001  # it is raised again in the test
                failed.append(error)

        return run

    def cutting(seed: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(50):
                assert_same(cut(net_of[seed]), wanted[seed - 1])

        return work

    def making() -> None:
        at = 0
        while not done.is_set() or at < len(draws):
            assert torch.tensor([1.0]).dtype is torch.float32 and torch.zeros(2).device.type == "cpu"
            assert torch.get_default_dtype() is torch.float32
            if at < len(draws):
                assert torch.equal(torch.rand(4), draws[at])
                at += 1
            F.relu(encoder(torch.ones(1, 2, 8)))

    net_of = {seed: net(seed) for seed in (1, 2)}
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.random.fork_rng(), untouched(*net_of.values()):
        state = torch.get_rng_state()
        torch.manual_seed(5)
        workers = [threading.Thread(target=guarded(cutting(seed))) for seed in (1, 2)]
        maker = threading.Thread(target=guarded(making))
        for thread in (*workers, maker):
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        maker.join()
        torch.set_rng_state(state)
    assert not failed, failed[0]


def test_two_threads_may_cut_one_model() -> None:
    model, wanted, found = net(), cut(net()), []
    model.train()
    with untouched(model):
        threads = [threading.Thread(target=lambda: found.append(cut(model))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    for small in found:
        assert_same(small, wanted)
        assert small.training and small.first.training
