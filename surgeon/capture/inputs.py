"""Example inputs: bring them into one form, or find some with which the model runs.

`find_inputs` looks for sizes that the model itself states (timm's `default_cfg`, transformers' `dummy_inputs`
and config); else it deduces the kind of input from the first layer and tries spatial sizes until one runs. It
always says what it assumed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.capture.meta_run import real_indices
from surgeon.capture.model_state import output_of, quiet_run
from surgeon.errors import CaptureError, InputError
from surgeon.graph.tensors import tensor_leaves

_SIZES = (224, 32, 28, 64, 256, 299, 384, 128, 96, 48, 16, 8, 512)
_LENGTHS = (16, 128, 512, 1024, 16000)


class Calls(tuple[Any, ...]):
    """Several calls of a model as example inputs: `surgeon.Calls([x, (x, mask), {"x": longer}])`.

    Each is a tensor, a tuple of positional arguments or a dict of keywords. All of them are recorded, and what any
    of them runs is tied, mended and proved: other sizes, other optional arguments. Costs are those of the first.

    A plain list is taken for several calls as well where it cannot be one: where it holds tuples or dicts alone, or
    more items than the model's forward takes.
    """

    def __new__(cls, calls: Iterable[Any]) -> Calls:
        made = super().__new__(cls, calls)
        if not made:
            raise InputError("Calls holds no call", fix="pass the inputs of at least one call")
        return made


def calls_of(model: nn.Module, example_inputs: Any) -> list[Any]:
    """The calls that example inputs hold, one in most cases.

    Raises:
        InputError: a list is empty.
    """
    if isinstance(example_inputs, Calls):
        return list(example_inputs)
    if type(example_inputs) is list and _are_calls(model, example_inputs):
        return list(Calls(example_inputs))
    return [example_inputs]


def _are_calls(model: nn.Module, items: list[Any]) -> bool:
    """Whether a list can only be several calls."""
    if all(type(item) is tuple for item in items) or all(isinstance(item, Mapping) for item in items):
        return True
    try:
        inspect.signature(model.forward).bind(*items)
    except TypeError:
        return True
    except ValueError:  # it has no signature
        return False
    return False


def input_name(model: nn.Module, path: str) -> str:
    """An input as the model's forward calls it: its path is "0.i" for the argument at place i, "1.name" for a keyword."""
    where, _, rest = path.partition(".")
    place, _, inner = rest.partition(".")
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):  # it has no signature
        given = inspect.signature(model.forward).parameters
    names = [name for name, one in given.items() if one.kind in places]
    if where == "0" and place.isdigit():
        place = names[int(place)] if int(place) < len(names) else f"input {place}"
    return f"{place}.{inner}" if inner else place


def normalize(example_inputs: Any, called: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a tensor, a tuple or list (positional) or a dict (keywords).

    Args:
        called: how errors call the inputs.

    Raises:
        InputError: there is no tensor in it, or it has NaN or infinite values.
    """
    if isinstance(example_inputs, Calls):
        raise InputError(
            f"{called} holds {len(example_inputs)} calls of the model, and one is needed here",
            fix="pass the inputs of one call",
        )
    if isinstance(example_inputs, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {str(key): value for key, value in example_inputs.items()}
    elif isinstance(example_inputs, tuple | list):
        args, kwargs = tuple(example_inputs), {}
    else:
        args, kwargs = (example_inputs,), {}
    leaves = list(tensor_leaves((args, kwargs)))
    if not leaves:
        raise InputError(
            f"{called} holds no tensor (it is a {type(example_inputs).__name__})",
            fix="pass a tensor, a tuple of positional arguments or a dict of keyword arguments",
        )
    for path, tensor in leaves:
        if tensor.is_nested:
            raise InputError(
                f"{called} holds a nested tensor, of rows of several lengths",
                where=path,
                fix="pass a padded tensor (torch.nested.to_padded_tensor), with a mask if the model takes one",
            )
        if tensor.layout is not torch.strided:
            tensor = tensor.to_sparse_coo().coalesce().values()  # its numbers
        if tensor.is_floating_point() and not tensor.is_meta and torch.isnan(tensor).any():
            raise InputError(
                f"{called} holds NaN", where=path, fix="pass finite inputs: NaN would hide every proof"
            )
    return args, kwargs


def find_inputs(model: nn.Module) -> tuple[Any, str]:
    """Inputs with which the model runs, and a sentence that says what was assumed.

    Raises:
        CaptureError: nothing that was tried runs.
    """
    tried: list[str] = []
    for inputs, said in _candidates(model):
        error = _runs(model, inputs)
        if error is None:
            return inputs, f"no example inputs were given; assumed {said}"
        tried.append(f"{said}: {error}")
    raise CaptureError(
        "no example inputs were given and none could be found",
        why="; ".join(tried[:4]) if tried else "the model has no layer whose input shape surgeon can deduce",
        fix="pass example_inputs=... (a tensor, a tuple, or a dict of keywords)",
    )


def _candidates(model: nn.Module) -> Any:
    dtype, device = _place(model)
    stated = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = stated.get("input_size") if isinstance(stated, Mapping) else None
    if size:
        yield (
            torch.randn(1, *size, dtype=dtype, device=device),
            f"{(1, *size)}, from the model's own configuration",
        )
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except (AttributeError, NotImplementedError, ValueError):
        dummy = None
    if isinstance(dummy, Mapping) and dummy:
        placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in dummy.items()}
        yield placed, "the model's own dummy_inputs"
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    if isinstance(first, nn.Embedding):
        for length in _LENGTHS[:2]:
            ids = torch.arange(length, device=device)[None] % first.num_embeddings
            yield ids, f"token ids of shape {tuple(ids.shape)}, from the first layer (an embedding)"
    elif isinstance(first, nn.Linear):
        shape: tuple[int, ...]
        for shape in ((1, first.in_features), (1, 16, first.in_features)):
            yield (
                torch.randn(shape, dtype=dtype, device=device),
                f"{shape}, from the first layer (a linear layer)",
            )
    elif isinstance(first, nn.modules.rnn.RNNBase):
        shape = (1, 16, first.input_size) if first.batch_first else (16, 1, first.input_size)
        yield (
            torch.randn(shape, dtype=dtype, device=device),
            f"{shape}, from the first layer (a recurrent layer)",
        )
    elif isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        dims = len(first.kernel_size)
        for side in _LENGTHS if dims == 1 else _SIZES if dims == 2 else (32, 64, 112):
            shape = (1, first.in_channels, *(side,) * dims)
            yield (
                torch.randn(shape, dtype=dtype, device=device),
                f"{shape}, from the first layer (a convolution)",
            )


_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.modules.rnn.RNNBase)


def _place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.float32, torch.device("cpu")


def _runs(model: nn.Module, inputs: Any) -> str | None:
    """None if the model runs on the inputs, else the first line of its error."""
    args, kwargs = real_indices(normalize(inputs))
    try:
        with quiet_run(model, seed=0):
            output_of(model, args, kwargs)
    except Exception as error:  # noqa: BLE001  # the model's own code: anything may come out of it, and all of it is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    return None
