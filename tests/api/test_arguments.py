"""Arguments that stand in the wrong place or have another library's name: one error that says what was meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import surgeon
from surgeon.errors import InputError, SurgeonError
from surgeon.selection.options import OPTIONS, PlanOptions, check_names

X = torch.randn(2, 5)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))


def cut(model: nn.Module) -> tuple[nn.Module, nn.Module, surgeon.Plan]:
    """Original, small model, plan."""
    plan = surgeon.inspect(model, X).plan(0.5)
    return model, plan.apply(model), plan


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "inputs as the ratio": (lambda m: surgeon.shrink(m, X), "example_inputs="),
    "a tuple of inputs as the ratio": (lambda m: surgeon.shrink(m, (X,)), "example_inputs="),
    "named inputs as the ratio": (lambda m: surgeon.shrink(m, {"x": X}), "example_inputs="),
    "inputs as the ratio of a plan": (lambda m: surgeon.inspect(m, X).plan(X), "example_inputs="),
    "swapped": (lambda m: surgeon.inspect(X, m), "the model comes first"),
    "swapped in shrink": (lambda m: surgeon.shrink(X, m), "the model comes first"),
    "ratio and model swapped": (lambda m: surgeon.shrink(0.5, m), "the model comes first"),
    "a ratio as the inputs": (lambda m: surgeon.inspect(m, 0.5), "surgery.plan(0.5)"),
    "flops": (lambda m: surgeon.shrink(m, flops=0.5, example_inputs=X), "did you mean macs?"),
    "pruning_ratio": (
        lambda m: surgeon.shrink(m, pruning_ratio=0.5, example_inputs=X),
        "did you mean ratio?",
    ),
    "ignored_layers": (
        lambda m: surgeon.inspect(m, X).plan(0.5, ignored_layers=[m]),
        "did you mean ignore?",
    ),
    "a slip": (lambda m: surgeon.inspect(m, X).plan(0.5, criteron="l2"), "did you mean criterion?"),
    "a module as the ratio's name": (lambda m: surgeon.inspect(m, X).plan({m[0]: 0.5}), "named_modules()"),
    "no model": (lambda m: surgeon.inspect(m, X).plan(0.5).apply(None), "plan.apply(model)"),
    "original and small model swapped": (
        lambda m: surgeon.verify(*cut(m)[1::-1], cut(m)[2], X),
        "in the other order",
    ),
    "plan and small model swapped": (
        lambda m: surgeon.verify(m, *cut(m)[:0:-1], X),
        "write it so: surgeon.verify(model, small, plan, example_inputs)",
    ),
    "inputs as the plan": (lambda m: surgeon.verify(m, cut(m)[1], X), "pass what surgery.plan(...)"),
    "recovery in another order": (
        lambda m: surgeon.recover(*cut(m), [X]),
        "surgeon.recover(small, plan, model, batches)",
    ),
    "recovery swapped": (lambda m: surgeon.recover(m, cut(m)[2], cut(m)[1], [X]), "in the other order"),
    "a model as the factory": (lambda m: surgeon.load("folder", m), "a function without arguments"),
    "the factory first": (lambda m: surgeon.load(lambda: m, "folder"), "surgeon.load(folder, factory)"),
    "a class that needs arguments": (lambda m: surgeon.load("folder", nn.Linear), "lambda: Linear(...)"),
    "a factory of something else": (lambda m: surgeon.load("folder", dict), "the factory gave a dict"),
    "the folder first": (lambda m: surgeon.save("folder", cut(m)[1]), "surgeon.save(small, folder)"),
    "a model to quantise": (lambda m: surgeon.quantize(m, "out.onnx", [X]), "surgeon.export(model, path, x)"),
    "the path first": (
        lambda m: surgeon.export("model.onnx", m, X),
        "surgeon.export(model, path, example_inputs)",
    ),
    "inputs as the path": (lambda m: surgeon.export(m, X, "model.onnx"), "path is a Tensor"),
    "a model to examine": (lambda m: surgeon.doctor(m), "not a path"),
    "nothing to fuse": (lambda m: surgeon.fuse(None), "pass the nn.Module itself"),
    "batches first": (lambda m: surgeon.finetune([(X, X)], m), "model is a list"),
    "a model to regularise": (lambda m: surgeon.regularizer(m, "l1", 0.1), "surgeon.inspect(model, ...)"),
    "inputs as the ratio of steps": (lambda m: surgeon.iterate(m, X), "example_inputs="),
    "models to compose": (lambda m: surgeon.inspect(m, X).compose([m]), "surgery.compose([plan, ...])"),
    "a model as a plan's file": (lambda m: surgeon.Plan.load(m), "path is a Sequential"),
    "a model as an optimizer": (lambda m: cut(m)[2].apply(m, optimizer=m), "the torch optimizer"),
    "a module of another model": (lambda m: surgeon.inspect(m, X).explain(nn.Linear(2, 2)), "not part of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_error_says_what_was_meant(case: str) -> None:
    call, text = WRONG[case]
    with pytest.raises(InputError) as caught:
        call(net())
    assert text in str(caught.value) and len(str(caught.value)) < 900


def test_warnings_point_at_the_line_of_the_caller() -> None:
    class Scaled(nn.Module):
        """Its scale counts the terms of a sum, so that it follows the width."""

        def __init__(self) -> None:
            super().__init__()
            self.width, self.a, self.b = 16, nn.Linear(5, 16), nn.Linear(5, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).view(-1, self.width) @ self.b(x).T * self.width**-0.5

    model = Scaled().eval()
    calls: list[Callable[[], Any]] = [
        lambda: surgeon.shrink(model, 0.5),
        lambda: surgeon.shrink(model, 0.5, example_inputs=X),
        lambda: surgeon.inspect(model, X).plan(0.5).apply(model),
        lambda: surgeon.inspect(model, X).cut(0.5),
        lambda: surgeon.inspect(model, X).plan(macs="150%"),
    ]
    for number, call in enumerate(calls):
        with pytest.warns(UserWarning) as said:
            call()
        assert {warning.filename for warning in said} == {__file__}, number


def test_a_module_can_be_explained() -> None:
    model = net()
    surgery = surgeon.inspect(model, X)
    assert str(surgery.explain(model[0])) == str(surgery.explain("0"))


def test_print_outs_are_short_where_they_should_be() -> None:
    surgery = surgeon.inspect(net(), X)
    plan = surgery.plan(0.5, round_to=1)
    for text in (repr(plan), repr(surgery)):
        assert len(text) < 300 and "\n" not in text
    assert str(surgery).startswith("Sequential: 130 params, 224 MACs on input (2, 5)\n")
    assert "Sequential" in repr(surgery) and "1 groups" in repr(surgery)
    assert "0.weight[0] keeps 8" in str(plan) and str(plan).startswith("Plan: 130 -> 66 params")


@pytest.mark.parametrize("function", [surgeon.Surgery.plan, surgeon.shrink, surgeon.iterate])
def test_the_options_stand_once(function: Callable[..., Any]) -> None:
    """All of them are in the signature, with their defaults, and explained."""
    parameters = inspect.signature(function).parameters
    for name, option in OPTIONS.items():
        assert parameters[name].default == option.default
        assert f"\n    {name}: " in (function.__doc__ or "")
    assert set(OPTIONS) == set(PlanOptions.__annotations__)
    check_names(OPTIONS)


def test_selection_is_plain_data() -> None:
    surgery = surgeon.inspect(net(), X)
    selection = surgery.select(0.5, round_to=1)
    small, plan = surgery.cut(0.5, round_to=1)
    assert selection.kept == plan.kept and selection.cost.macs == plan.macs
    assert plan == surgery.plan(0.5, round_to=1) == surgeon.Plan.from_json(small._surgeon_plans[-1])
    again = plan.apply(surgery.model)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


NAMES = {"too long": "x" * 300, "a zero byte": "a\0b"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    """Python asks the system about them in several ways, and each raises something else."""
    path, x = f"{tmp_path}/{NAMES[name]}", torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    small = surgeon.shrink(model, 0.5, example_inputs=x, round_to=1)
    real = tmp_path / "a.onnx"
    surgeon.export(small, real, x)
    plan = surgeon.Plan.of(small)[0]
    for use in (
        lambda: surgeon.save(small, path),
        lambda: surgeon.load(path, lambda: model),
        lambda: surgeon.export(small, path, x),
        lambda: surgeon.quantize(real, path, [x]),
        lambda: surgeon.quantize(path, tmp_path / "b.onnx", [x]),
        lambda: surgeon.doctor(path),
        lambda: surgeon.bench({"a": path}, x),
        lambda: plan.save(path),
        lambda: surgeon.Plan.load(path),
        lambda: surgeon.finetune(small, [(x, x)], loss=lambda out, y: out.mean(), epochs=1, checkpoint=path),
    ):
        with pytest.raises(SurgeonError):
            use()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.onnx"]


def test_messages_name_what_the_user_wrote(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(SurgeonError, match=r"inputs were: input \(1, 5\)"):
        surgeon.inspect(model, torch.randn(1, 5))
    with pytest.raises(InputError, match="opset must be a whole number, got 'x'"):
        surgeon.export(model, tmp_path / "a.onnx", torch.randn(1, 4), opset="x")
    surgeon.export(model, tmp_path / "a.onnx", torch.randn(1, 4))
    with pytest.raises(SurgeonError, match="why: it holds NaN"):
        surgeon.quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", [torch.full((1, 4), torch.nan)])
    plan = surgeon.inspect(model, torch.randn(1, 4)).plan(np.float32(0.5), round_to=1)
    assert plan.apply(model)[0].out_features == 4 and surgeon.Plan.from_json(plan.to_json()) == plan
