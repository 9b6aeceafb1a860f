"""A forward in which a number changed does in both modes, and on any device, what the user's forward does.

A number in the module's own methods is changed in their source; one in a function that they call, in the
traced forward.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import MendError
from surgeon.mend.methods.traced_forward import versions

X = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    """Eight channels, a number in view that must follow them, and something that the training mode
    decides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def mixed(self, x: Tensor) -> Tensor:
        return self.a(x).view(-1, 8, 9).mean(2)


def mixed(x: Tensor) -> Tensor:
    return x.view(-1, 8, 9).mean(2)


class ByFunction(Flat):
    """The number is in a function that others may call, too."""

    def mixed(self, x: Tensor) -> Tensor:
        return mixed(self.a(x))


class Dropped(Flat):
    """The mode is handed on, as in the classic networks for digits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.mixed(x), 0.5, self.training))


class Branched(Flat):
    """The mode decides what runs, on both sides of the number."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.rand_like(x).view(-1, 3, 3, 3)
        y = self.mixed(x)
        if self.training:
            y = y * torch.rand(1)
        return self.b(y)


class DroppedByFunction(ByFunction, Dropped):
    pass


class BranchedByFunction(ByFunction, Branched):
    pass


class Untraceable(Flat):
    """In training the code looks into its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixed(x)
        if self.training and bool(y.sum() > 0):
            y = y * 2
        return self.b(y)


class UntraceableByFunction(ByFunction, Untraceable):
    pass


class Targeted(ByFunction):
    """Looks into its tensors in training, for which it needs more than surgeon has."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.mixed(x)
        if self.training and bool((y.sum() - target) > 0):
            y = y * 2
        return self.b(y)


class Placed(ByFunction):
    """Makes tensors of numbers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.mixed(x * (torch.arange(3) + 1)))


class Looking(ByFunction):
    """Looks into a tensor of numbers alone, which torch.fx can only do while it traces."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixed(x)
        return self.b(y * 2 if torch.arange(3)[2] > 1 else y)


class Looped(Flat):
    """Loops over a size, unpacks sizes, and asks what it inherits for the rest."""

    def forward(self, x: Tensor, scale: float = 3.0) -> Tensor:
        y = self.mixed(x)
        for _ in range(x.shape[0]):
            y = y + scale
        return super().__getattr__("b")(self.turned(y))

    def turned(self, y: Tensor) -> Tensor:
        """Back and forth, with numbers of its own: 8 of them."""
        turn: Callable[[Tensor], Tensor] = lambda t: t.view(*t.shape[:1], 8, 1).transpose(1, 2)  # noqa: E731  # 8 by 1
        return turn(y).reshape(-1, 8)


EVAL, TRAINING = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 7.0])


class Outside(Flat):
    """Reads tensors that lie outside of it, another one in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * TRAINING if self.training else x * EVAL
        return self.b(self.mixed(x))


class OutsideByFunction(ByFunction, Outside):
    pass


class Optional(Flat):
    """Takes what may be left out; torch.fx would trace one of the two."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask
        return self.b(self.mixed(x))


def halved(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    small = surgeon.shrink(make().eval(), 0.5, example_inputs=X, round_to=1)
    assert small.a.out_channels == 4
    assert type(small) is not make  # the number in view was changed
    return small


def unpickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)  # our own file: what is tested is that it pickles
    return found


@pytest.mark.parametrize("make", [Dropped, DroppedByFunction, Branched, BranchedByFunction])
@pytest.mark.parametrize(
    "passed_on",
    [lambda m: m, copy.deepcopy, unpickled, torch.jit.script],
    ids=["", "copied", "pickled", "scripted"],
)
def test_both_modes_stay(make: Callable[[], nn.Module], passed_on: Callable[[nn.Module], nn.Module]) -> None:
    small = passed_on(halved(make))
    small.eval()
    assert torch.equal(small(X), small(X))
    small.train()
    assert not torch.equal(small(X), small(X))
    small.eval()
    assert torch.equal(small(X), small(X))


@pytest.mark.parametrize("make", [Branched, BranchedByFunction, Outside, OutsideByFunction, Looped])
@pytest.mark.parametrize("training", [False, True])
def test_each_mode_does_what_the_original_does(make: Callable[[], nn.Module], training: bool) -> None:
    """Draw by draw, with the channels that left at zero in the original."""
    torch.manual_seed(0)
    model = make().eval()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    small = copy.deepcopy(plan.apply(model)).train(training)
    model.train(training)
    gone = sorted({*range(8)} - {*plan.kept["a.weight"][0]})
    with torch.no_grad():
        model.b.weight[:, gone] = 0
    torch.manual_seed(1)
    want = model(X)
    torch.manual_seed(1)
    torch.testing.assert_close(small(X), want)


def test_one_version_where_the_mode_is_handed_on() -> None:
    assert {kind.__name__: [*versions(kind())] for kind in (Dropped, Branched, Untraceable)} == {
        "Dropped": [None],
        "Branched": [False, True],
        "Untraceable": [False],
    }


def test_the_users_code_stays() -> None:
    """Numbers are changed in the source of the methods that hold them; the rest is the user's code, word for
    word.
    """
    small = halved(Looped)
    assert inspect.getsource(type(small).forward) == inspect.getsource(Looped.forward)
    wanted = (
        inspect.getsource(Looped.turned)
        .replace("[:1], 8, 1)", "[:1], 4, 1)")
        .replace("reshape(-1, 8)", "reshape(-1, 4)")
    )
    assert inspect.getsource(type(small).turned) == wanted
    assert type(small).turned.__annotations__ == Looped.turned.__annotations__
    for other in (copy.deepcopy(small), unpickled(small)):
        assert torch.equal(other(X), small(X)) and torch.equal(other(X, scale=1.0), small(X, scale=1.0))
    assert not torch.equal(small(X, scale=1.0), small(X))
    assert halved(Untraceable).train()(X).shape == (2, 2)


def test_what_may_be_left_out_may_be_given() -> None:
    small = halved(Optional)
    assert torch.equal(small(X, torch.ones(3, 3)), small(X))
    assert not torch.equal(small(X, torch.eye(3)), small(X))


def test_a_mode_that_cannot_be_traced_is_refused() -> None:
    """At once; where surgeon cannot run it, when it runs."""
    with pytest.raises(MendError, match="could not be changed"):
        halved(UntraceableByFunction)
    small = halved(Targeted)
    assert small(X).shape == (2, 2)
    with pytest.raises(RuntimeError, match="could not trace the forward in training mode"):
        small.train()(X, torch.zeros(()))


def test_classes_without_a_source() -> None:
    """As those that a program makes: their forward is traced."""
    space = {"nn": nn, "F": F, "Tensor": Tensor}
    exec("\n".join(map(inspect.getsource, (Flat, Dropped))), space)
    small = halved(space["Dropped"])  # type: ignore[arg-type]  # a class
    assert small(X).shape == (2, 2)
    assert "view(-1, 4, 9)" in inspect.getsource(type(small).forward)


def test_tensors_that_code_makes_are_made_when_it_runs() -> None:
    small = halved(Placed)
    assert not [name for name in vars(small) if "constant" in name]
    with torch.device("meta"):
        assert small.to("meta")(X.to("meta")).device.type == "meta"
    assert halved(Looking)(X).shape == (2, 2)
