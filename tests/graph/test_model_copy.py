"""A small model holds nothing of the original: what leads to a part of the original leads to the small one's."""

from __future__ import annotations

import collections
import copy
import functools
import queue
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import surgeon
from surgeon.errors import CopyError
from surgeon.graph.copying.model_copy import check_apart, copied

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions; subclasses add what is hard to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)
        self.add()

    def add(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def cut(model: nn.Module) -> nn.Module:
    """A proven small model that neither reads nor writes the original, by use and by references."""
    model.eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    surgeon.verify(model, small, plan, X)
    check_apart(model, small)
    before = small(X).detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(small(X), before)
    assert small.first.out_channels == 4 and small.first.weight.shape[0] == 4  # type: ignore[union-attr]
    return small


class ByHook(Net):
    """Reads an activation that a hook keeps for it."""

    def add(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.first.register_forward_hook(self.keeping("first"))

    def keeping(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.kept[name] = output

        return hook

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.last(self.kept["first"].relu())


class ByDict(Net):
    """The hook knows the dict, not the module."""

    def add(self) -> None:
        self.kept: dict[str, Tensor] = {}
        kept = self.kept
        self.first.register_forward_hook(lambda _m, _i, output: kept.__setitem__("first", output))

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.last(self.kept["first"].relu())


class ByMethod(Net):
    def add(self) -> None:
        self.step = self.first.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(x).relu())


class ByBuiltin(Net):
    """A bound method of a list that it holds."""

    def add(self) -> None:
        self.kept: list[Tensor] = []
        self.keep = self.kept.append

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.keep(self.first(x))
        return self.last(self.kept[0].relu())


class ByPartial(Net):
    def add(self) -> None:
        self.step = functools.partial(Net.forward, self)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)


class ByDefault(Net):
    """A lambda in a dict with a module as its default."""

    def add(self) -> None:
        self.steps = {"last": lambda x, last=self.last: last(x)}

    def forward(self, x: Tensor) -> Tensor:
        return self.steps["last"](self.first(x).relu())


class ByWrapper(Net):
    """Its forward was replaced, as mixed-precision wrappers do."""

    def add(self) -> None:
        inner = self.forward

        @functools.wraps(inner)
        def twice(x: Tensor) -> Tensor:
            return inner(x) * 2

        self.forward = twice  # type: ignore[method-assign]


class ByWeakReference(Net):
    def add(self) -> None:
        self.weak = weakref.ref(self.last)
        self.method = weakref.WeakMethod(self.first.forward)

    def forward(self, x: Tensor) -> Tensor:
        last, first = self.weak(), self.method()
        assert last is not None and first is not None
        return last(first(x).relu())


class ByProxy(Net):
    def add(self) -> None:
        self.parts = {"last": weakref.proxy(self.last)}
        self.known = weakref.WeakValueDictionary({"first": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["last"](self.known["first"](x).relu())


class ByCache(Net):
    def add(self) -> None:
        self.part = functools.lru_cache(maxsize=2)(self.find)

    def find(self, name: str) -> nn.Module:
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.part("last")(self.part("first")(x).relu())


class Owner:
    """A plain object that knows a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = [model]


class ByObject(Net):
    def add(self) -> None:
        self.owner = Owner(self.last)
        self.by_module = collections.defaultdict(list, {self.first: [1]})

    def forward(self, x: Tensor) -> Tensor:
        assert self.by_module[self.first] == [1]
        return self.owner.model[0](self.first(x).relu())


class ByTensor(Net):
    """A parameter knows the module that it belongs to."""

    def add(self) -> None:
        self.last.weight.owner = self.last  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.last.weight.owner(self.first(x).relu())


class WithSlots(Net):
    __slots__ = ("__hidden", "gain")

    def add(self) -> None:
        object.__setattr__(self, "gain", 3.0)
        object.__setattr__(self, "_WithSlots__hidden", [self.last])

    def forward(self, x: Tensor) -> Tensor:
        return self.__hidden[0](self.first(x).relu()) * self.gain


class OwnCopy(Net):
    """Its copies are built anew, which knows nothing of other widths."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = OwnCopy()
        made.load_state_dict(self.state_dict())
        return made


class OwnPickle(Net):
    def __reduce__(self) -> Any:
        return OwnPickle, ()


class CompiledInPlace(Net):
    def add(self) -> None:
        self.first.compile(backend="eager")


BOUND = [
    ByHook, ByDict, ByMethod, ByBuiltin, ByPartial, ByDefault, ByWrapper, ByWeakReference, ByProxy, ByCache, ByObject, ByTensor,
    WithSlots, OwnCopy, OwnPickle, CompiledInPlace,
]  # fmt: skip


@pytest.mark.parametrize("kind", BOUND)
def test_what_leads_to_the_model_leads_to_the_small_one(kind: type[Net]) -> None:
    cut(kind())


def test_a_model_compiled_in_place_is_cut_uncompiled() -> None:
    model = Net().eval()
    model.compile(backend="eager")
    model(X)
    small = cut(model)
    assert small._compiled_call_impl is None
    assert model._compiled_call_impl is not None


class WithParts(Net):
    """Holds what the process owns."""

    def add(self) -> None:
        self.lock = threading.Lock()
        self.queue: queue.Queue[int] = queue.Queue()
        self.numbers = (i for i in range(3))
        self.backend = torch
        self.local = threading.local()
        self.pattern = re.compile("a")
        self.file = open(__file__)  # noqa: SIM115  # it stays open while the model lives
        self.nested = {"locks": [threading.RLock()]}


def test_what_cannot_be_copied_is_shared() -> None:
    model = WithParts()
    small = cut(model)
    for name in ("lock", "queue", "numbers", "backend", "local", "file"):
        assert getattr(small, name) is getattr(model, name), name
    assert small.nested["locks"][0] is model.nested["locks"][0]  # type: ignore[index]
    assert small.nested is not model.nested
    model.file.close()


class KeepsMaps(Net):
    def add(self) -> None:
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        self.maps.append(y)
        return self.last(y)


def test_kept_activations_are_copied_without_their_history() -> None:
    model = KeepsMaps()
    model(X).sum().backward()
    small = cut(model)
    kept = small.maps[0]  # type: ignore[index]
    assert kept.grad_fn is None and torch.equal(kept, model.maps[0])
    assert kept.data_ptr() != model.maps[0].data_ptr()


class ByGenerator(Net):
    """A generator that runs and holds the model: it can be neither copied nor shared."""

    def add(self) -> None:
        self.steps = self.run()
        next(self.steps)

    def run(self) -> Any:
        while True:
            yield self.last


class ByLockedObject(Net):
    """An object with a lock that holds the model: its lock is shared, the rest copied."""

    def add(self) -> None:
        self.owner = Owner(self.last)
        self.owner.lock = threading.Lock()  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        with self.owner.lock:  # type: ignore[attr-defined]
            return self.owner.model[0](self.first(x).relu())


class ByOutsider(Net):
    def add(self) -> None:
        self.trainer = weakref.ref(TRAINER)
        TRAINER.model = [self]


TRAINER = Owner(nn.Identity())


def test_what_cannot_be_bound_is_refused_by_name() -> None:
    for kind, name in ((ByGenerator, "steps"), (ByOutsider, "trainer")):
        model = kind().eval()
        with pytest.raises(CopyError, match=name) as caught:
            surgeon.inspect(model, X).plan(0.5, round_to=1).apply(model)
        assert caught.value.why and caught.value.fix


def test_of_an_object_with_a_lock_only_the_lock_is_shared() -> None:
    model = ByLockedObject()
    small = cut(model)
    assert small.owner.lock is model.owner.lock  # type: ignore[union-attr,attr-defined]
    assert small.owner is not model.owner


HOLDER: dict[str, Any] = {}


class ByGlobal(Net):
    """Its code names a part of itself by a global name."""

    def add(self) -> None:
        HOLDER["last"] = self.last

    def forward(self, x: Tensor) -> Tensor:
        return HOLDER["last"](self.first(x).relu())


def test_a_method_that_reads_the_model_by_a_global_name_is_refused() -> None:
    model = ByGlobal().eval()
    with pytest.raises(CopyError, match="HOLDER"):
        surgeon.inspect(model, X).plan(0.5, round_to=1).apply(model)


class ByGlobalHook(Net):
    """A hook that reads a global name leads to the copy; other globals stay those of the file."""

    def add(self) -> None:
        HOLDER["last"] = self.last
        self.forward = lambda x: HOLDER["last"](self.first(x).relu() * GAIN)  # type: ignore[method-assign]


GAIN = 2.0


def test_a_function_that_reads_the_model_by_a_global_name_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    small = cut(ByGlobalHook())
    before = small(X) - small.last.bias.view(-1, 1, 1)  # type: ignore[union-attr]
    monkeypatch.setattr(f"{__name__}.GAIN", 4.0)
    torch.testing.assert_close(small(X) - small.last.bias.view(-1, 1, 1), before * 2)  # type: ignore[union-attr]


def test_functions_that_do_not_lead_to_the_model_are_shared() -> None:
    collected: list[Tensor] = []

    def collect(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        collected.append(output.detach())

    model = Net().eval()
    model.first.register_forward_hook(collect)
    small = cut(model)
    collected.clear()
    small(X)
    assert [tuple(t.shape) for t in collected] == [(2, 4, 6, 6)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: weight_norm(nn.Conv2d(8, 8, 3)),
        lambda: spectral_norm(nn.Conv2d(8, 8, 3)),
        lambda: prune.ln_structured(nn.Conv2d(8, 8, 3), "weight", 0.25, n=1, dim=0),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_hooks_make_are_cut_with_what_they_are_made_of(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), make(), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = plan.apply(model)
    layer: Any = small[2]  # type: ignore[index]
    assert layer.weight.shape == (4, 4, 3, 3) and (layer.in_channels, layer.out_channels) == (4, 4)
    made = layer.weight.clone()
    surgeon.verify(model, small, plan, X)
    small(X)
    torch.testing.assert_close(layer.weight, made)
    surgeon.verify(model, small, plan, X)  # and once more, after it ran
    small.train()(X).sum().backward()
    copied(small)  # its weight has a history now, which copy.deepcopy refuses
    with pytest.raises(RuntimeError):
        copy.deepcopy(small)


@pytest.mark.parametrize("kernel", [1, 3])
def test_tensors_keep_their_order_in_memory(kernel: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, kernel), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 4, kernel)
    ).eval()
    model = model.to(memory_format=torch.channels_last)
    small = surgeon.inspect(model, X).plan(0.5, round_to=1).apply(model)
    for index in (0, 1, 2):
        like: Any = nn.Conv2d(1, 1, 1)
        weight = small[index].weight  # type: ignore[index]
        like.weight = nn.Parameter(torch.empty(weight.shape).to(memory_format=torch.channels_last))
        assert weight.shape != model[index].weight.shape and weight.stride() == like.weight.stride()
