"""Modules that cannot be cut are refused at the entrance, with what to do instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn

import surgeon
from surgeon.errors import CaptureError, InputError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


def exported() -> nn.Module:
    module: nn.Module = torch.export.export(net().eval(), (X,)).module()
    return module


def prepared() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), *net(), quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    return model


def packed() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    quantised: nn.Module = quantization.quantize_dynamic(model, {nn.Linear})
    return quantised


class Packed(Tensor):
    """A tensor that holds its values in one of another form."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        made: Any = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[no-any-return]  # torch does not say

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Packed:
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [item.inner if isinstance(item, Packed) else item for item in args]
        return func(*plain, **(kwargs or {}))


def wrapped() -> nn.Module:
    model = net()
    model.register_buffer("scale", Packed(torch.ones(3)))
    return model


@pytest.mark.parametrize(
    ("make", "said", "do"),
    [
        (exported, "an exported program", "original nn.Module"),
        (prepared, "a quantised model", "cut the original"),
        (packed, "a quantised model", "cut the original"),
        (wrapped, "is a Packed", "plain tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_in_another_form(make: Callable[[], nn.Module], said: str, do: str) -> None:
    for refuse in (lambda m: surgeon.inspect(m, X), lambda m: surgeon.shrink(m, 0.5, example_inputs=X)):
        with pytest.raises(CaptureError, match=said) as error:
            refuse(make())
        assert do in error.value.fix


def test_an_exported_program_is_no_module() -> None:
    program: Any = torch.export.export(net().eval(), (X,))
    with pytest.raises(CaptureError, match="got ExportedProgram") as error:
        surgeon.inspect(program, X)
    assert "exported" in error.value.fix


def test_lazy_layers_have_to_run_once() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).eval()
    with pytest.raises(InputError, match="lazy layers") as error:
        surgeon.inspect(model, X)
    assert error.value.where == "0.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(X)
    surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)


def test_stubs_of_a_model_that_is_not_quantised_are_harmless() -> None:
    model = nn.Sequential(quantization.QuantStub(), *net(), quantization.DeQuantStub()).eval()
    small = surgeon.shrink(model, 0.5, example_inputs=X, round_to=1)
    assert small[1].out_channels == 4
