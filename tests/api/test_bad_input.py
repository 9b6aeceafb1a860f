"""What a user may do wrong: one clear error of the family with a remedy, or it simply works; the model is
never changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import (
    BudgetError,
    CaptureError,
    FileError,
    InputError,
    MendError,
    PlanError,
    ProofError,
    SurgeonError,
)


class Small(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x @ x.mT + torch.eye(4))


def nan_weights() -> nn.Module:
    model = Small()
    with torch.no_grad():
        model.body[0].weight[0, 0, 0, 0] = float("nan")
    return model


def inf_weights() -> nn.Module:
    model = Small()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    return model


class Unmendable(nn.Module):
    """A size hidden in a global that no attribute and no traced literal shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if float(y.sum()) > 1e9:  # keeps torch.fx out
            y = -y
        return self.b(y.view(-1, SIZES["width"]))


SIZES = {"width": 8}

BAD: list[tuple[str, type[SurgeonError], Callable[[], nn.Module], dict[str, Any], str]] = [
    ("ratio of one", InputError, Small, {"ratio": 1.0}, "outside [0, 1)"),
    ("negative ratio", InputError, Small, {"ratio": -0.1}, "outside [0, 1)"),
    ("nan ratio", InputError, Small, {"ratio": float("nan")}, "finite"),
    ("ratio as text", InputError, Small, {"ratio": "0.5"}, "finite number"),
    ("nothing asked", InputError, Small, {}, "neither a ratio nor a budget"),
    ("ratio and budget", InputError, Small, {"ratio": 0.5, "macs": 0.5}, "ratio and macs together"),
    ("an unknown unit", InputError, Small, {"macs": "5 apples"}, "known units: %, k, m, g, t"),
    ("bytes without a unit", InputError, Small, {"size": 3000}, "size=3000 has no unit"),
    (
        "a ratio for nothing",
        InputError,
        Small,
        {"ratio": {"layer9": 0.5}},
        "'layer9', which matches no layer",
    ),
    ("a cap for nothing", InputError, Small, {"ratio": 0.5, "max_ratio": {"x.*": 0.5}}, "max_ratio names 'x"),
    ("a cap above one", InputError, Small, {"ratio": 0.5, "max_ratio": 1.5}, "max_ratio 1.5 is outside"),
    (
        "ratios by name, globally",
        InputError,
        Small,
        {"ratio": {"*": 0.5}, "scope": "global"},
        "contradict each other",
    ),
    ("unknown target", InputError, Small, {"ratio": 0.5, "round_to": "tpu"}, "auto, cpu, cuda, npu"),
    ("no channel at least", InputError, Small, {"ratio": 0.5, "min_channels": 0}, "min_channels"),
    ("zero budget", InputError, Small, {"macs": 0}, "must be positive"),
    ("budget too small", BudgetError, Small, {"params": 10}, "is the least that can stay"),
    ("macs too small", BudgetError, Small, {"macs": 1e-6}, "is the least that can stay"),
    (
        "unknown criterion",
        InputError,
        Small,
        {"ratio": 0.5, "criterion": "magic"},
        "bn_scale, first, fpgm, l1, l2, lamp, random",
    ),
    ("unknown scope", InputError, Small, {"ratio": 0.5, "scope": "local"}, "uniform, global, isomorphic"),
    ("bad round_to", InputError, Small, {"ratio": 0.5, "round_to": 0}, "round_to"),
    ("criterion without norms", InputError, Small, {"ratio": 0.5, "criterion": "bn_scale"}, "body.3.weight"),
    ("wrong scores", InputError, Small, {"ratio": 0.5, "criterion": lambda g, t: [1.0]}, "shape (1,)"),
    (
        "nan scores",
        InputError,
        Small,
        {"ratio": 0.5, "criterion": lambda g, t: [float("nan")] * g.units},
        "NaN",
    ),
    ("unknown ignore", InputError, Small, {"ratio": 0.5, "ignore": ["body.9"]}, "body.9"),
    (
        "foreign ignore",
        InputError,
        Small,
        {"ratio": 0.5, "ignore": [nn.Linear(1, 1)]},
        "not part of the model",
    ),
    (
        "inputs that do not run",
        CaptureError,
        Small,
        {"ratio": 0.5, "example_inputs": torch.randn(2, 4, 8, 8)},
        "does not run",
    ),
    ("inputs without tensors", InputError, Small, {"ratio": 0.5, "example_inputs": {"x": 3}}, "no tensor"),
    ("nan inputs", InputError, Small, {"ratio": 0.5, "example_inputs": X * float("nan")}, "NaN"),
    ("nan weights", InputError, nan_weights, {"ratio": 0.5}, "body.0.weight"),
    ("inf weights", InputError, inf_weights, {"ratio": 0.5}, "head.weight"),
    (
        "no group",
        BudgetError,
        lambda: nn.Linear(3, 5),
        {"ratio": 0.5, "example_inputs": torch.randn(2, 3)},
        "no group",
    ),
    ("opaque", BudgetError, Opaque, {"ratio": 0.5, "example_inputs": torch.randn(4, 6)}, "no group"),
    (
        "hidden size",
        MendError,
        Unmendable,
        {"ratio": 0.5, "example_inputs": torch.randn(2, 6)},
        "test_bad_input.py",
    ),
]


@pytest.mark.parametrize(("kind", "make", "options", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_refused(
    kind: type[SurgeonError], make: Callable[[], nn.Module], options: dict[str, Any], text: str
) -> None:
    torch.manual_seed(0)
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        surgeon.shrink(model, **{"example_inputs": X, **options})
    assert text in str(caught.value)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[n], v) or not v.isfinite().all() for n, v in model.state_dict().items())


def test_no_module() -> None:
    with pytest.raises(CaptureError, match=r"expected a torch\.nn\.Module"):
        surgeon.inspect("resnet18")  # type: ignore[arg-type]  # the mistake under test


def test_script_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="TorchScript"):
        surgeon.inspect(torch.jit.trace(Small().eval(), X), X)


def test_training_mode_comes_back() -> None:
    model = Small().train()
    model.body[1].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    small = surgeon.shrink(model, 0.5, example_inputs=X)
    assert [m.training for m in model.modules()] == flags == [m.training for m in small.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert small.head.weight.grad is not None
    assert small.head.weight.grad.shape == small.head.weight.shape


def test_frozen_parameters_stay_frozen() -> None:
    model = Small()
    model.body[0].weight.requires_grad_(False)
    small = surgeon.shrink(model, 0.5, example_inputs=X)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    small = surgeon.shrink(model, 0.5, example_inputs=X.to(dtype), round_to=1)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small.body[0].weight.shape == (8, 3, 3, 3)


def test_example_inputs_are_found_and_reported() -> None:
    with pytest.warns(UserWarning, match="assumed"):
        small = surgeon.shrink(Small(), 0.5, round_to=1)
    assert small.body[0].out_channels == 8
    assert "assumed" in str(surgeon.inspect(Small()))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = (
                nn.Embedding(11, 16),
                nn.Linear(16, 16),
                nn.Linear(16, 11, bias=False),
            )
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mid(self.embed(ids)).relu())

    ids = torch.tensor([[1, 2, 3]])
    small = surgeon.shrink(Tied(), 0.5, example_inputs=ids)
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (11, 8)


def saved(tmp_path: Path) -> tuple[Small, surgeon.Plan, Path]:
    torch.manual_seed(0)
    model = Small()
    plan = surgeon.inspect(model, X).plan(0.5, round_to=1)
    plan.save(tmp_path / "plan.json")
    return model, plan, tmp_path / "plan.json"


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    model, plan, path = saved(tmp_path)
    loaded = surgeon.Plan.load(path)
    assert loaded == plan
    small = loaded.apply(model)
    assert surgeon.verify(model, small, loaded, X).error <= 1e-12
    torch.manual_seed(9)
    assert loaded.apply(Small()).body[0].out_channels == 8  # other weights, same architecture


@pytest.mark.parametrize("damage", ["truncated", "edited", "not json", "other json", "missing", "newer"])
def test_damaged_plans_are_refused(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path)[2]
    text = path.read_text()
    data = json.loads(text)
    if damage == "truncated":
        path.write_text(text[: len(text) // 2])
    elif damage == "edited":
        dims = next(iter(data["kept"].values()))
        dims[next(iter(dims))][0] += 1
        path.write_text(json.dumps(data))
    elif damage == "not json":
        path.write_bytes(b"\x00\xff")
    elif damage == "other json":
        path.write_text("[1, 2]")
    elif damage == "newer":
        path.write_text(json.dumps({**data, "version": 99}))
    else:
        path.unlink()
    with pytest.raises(PlanError) as caught:
        surgeon.Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_for_another_architecture_is_refused(tmp_path: Path) -> None:
    model, plan, _ = saved(tmp_path)
    with pytest.raises(PlanError, match="another architecture"):
        plan.apply(Small(width=12))
    with pytest.raises(PlanError, match="another architecture"):
        plan.apply(plan.apply(model))
    with pytest.raises(PlanError, match="another architecture"):
        plan.apply(nn.Linear(3, 3))


def test_unwritable_paths(tmp_path: Path) -> None:
    plan = saved(tmp_path)[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        plan.save(tmp_path / "file" / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "plan.json"]


def test_a_changed_small_model_fails_the_proof() -> None:
    torch.manual_seed(0)
    model = Small()
    plan = surgeon.inspect(model, X).plan(0.5)
    small = plan.apply(model)
    with torch.no_grad():
        small.body[0].weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(ProofError) as caught:
        surgeon.verify(model, small, plan, X)
    assert "body.0.weight" in str(caught.value)


def test_a_changed_forward_fails_the_proof_and_names_the_op() -> None:
    torch.manual_seed(0)
    model = Small()
    plan = surgeon.inspect(model, X).plan(0.5)
    small = plan.apply(model)
    small.body[1].eps = 1e-4
    with pytest.raises(ProofError) as caught:
        surgeon.verify(model, small, plan, X)
    assert "convolution in module 'body.3'" in str(caught.value)


def test_weights_of_another_model_fail_the_proof() -> None:
    model, other = Small(), Small()
    plan = surgeon.inspect(model, X).plan(0.5)
    with pytest.raises(ProofError):
        surgeon.verify(other, plan.apply(model), plan, X)


def test_errors_say_where_why_and_what_to_do() -> None:
    error = InputError("it broke", where="here", why="because", fix="mend it")
    assert str(error) == "it broke\n  where: here\n  why: because\n  do: mend it"
    assert isinstance(error, ValueError)
