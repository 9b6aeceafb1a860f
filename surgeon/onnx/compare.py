"""Do an ONNX file and a model agree? Inputs of other sizes and values, both runs, and their relative
error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgeon.errors import InputError
from surgeon.graph.tensors import tensor_leaves

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Array = np.ndarray[Any, Any]


def batch_size_of(inputs: Inputs) -> int:
    """Dim 0 of the first tensor in (args, kwargs) that has one; 0 if all are scalars."""
    return next((int(tensor.shape[0]) for _, tensor in tensor_leaves(inputs) if tensor.ndim), 0)


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """The inputs with `size` rows, repeated or cut along dim 0 of every tensor that has the batch size of the
    first.
    """
    batch = batch_size_of(inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch or size == batch:
            return value
        return value.index_select(0, torch.arange(size, device=value.device) % max(batch, 1))

    return cast(Inputs, pytree.tree_map(resize, inputs))


def doubled(inputs: Inputs, dims: Sequence[Mapping[int, str]]) -> Inputs:
    """The inputs with twice the size along the named dims of each tensor leaf, in order."""
    left = list(dims)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for dim in left.pop(0):
            value = torch.cat([value, value], dim)
        return value

    return cast(Inputs, pytree.tree_map(resize, inputs))


def fresh(inputs: Inputs, seed: int) -> Inputs:
    """Other float values in the range of the given ones: shuffled, or normal where they were constant."""
    generator = torch.Generator().manual_seed(seed)

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            return value
        flat = value.detach().reshape(-1)
        if bool((flat == flat[0]).all()):
            return torch.randn(value.shape, generator=generator).to(value)
        return flat[torch.randperm(flat.numel(), generator=generator).to(flat.device)].reshape(value.shape)

    return cast(Inputs, pytree.tree_map(change, inputs))


def cast_floats(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with every floating-point tensor in `dtype`."""
    return cast(
        Inputs, pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    )


_FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


def feeds(inputs: Inputs, session_inputs: Sequence[Any]) -> dict[str, Array]:
    """The tensor leaves of (args, kwargs) as arrays for ONNX inputs: by name where all names agree, else in
    order.

    Floating-point values are cast to the floating-point type that the file asks for, so that one set of
    inputs serves files of several precisions.

    Raises:
        InputError: there are more or fewer tensors than inputs, or a tensor has a dtype that numpy does not
            have.
    """
    names = [item.name for item in session_inputs]
    leaves = [(path, _array(path, tensor)) for part in inputs for path, tensor in tensor_leaves(part)]
    known = dict(leaves)
    if set(names) <= set(known):
        given = [known[name] for name in names]
    elif len(names) == len(leaves):
        given = [array for _, array in leaves]
    else:
        what = f"the file has {len(names)} inputs ({', '.join(names)}) but {len(leaves)} tensors were given"
        raise InputError(what, fix="pass example inputs with one tensor for each input of the file")
    wanted = [_FLOATS.get(item.type) for item in session_inputs]
    cast_to = [
        a.astype(t) if t is not None and a.dtype in _HALVES else a for a, t in zip(given, wanted, strict=True)
    ]
    return dict(zip(names, cast_to, strict=True))


_HALVES = (np.dtype(np.float16), np.dtype(np.float32))  # a double is not narrowed without a word


def _array(path: str, tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return cast(Array, tensor.float().numpy())
    try:
        return cast(Array, tensor.numpy())
    except TypeError as error:
        raise InputError(f"{tensor.dtype} cannot be fed to a file", where=path, why=str(error)) from error


def relative_error(found: Any, expected: Any) -> float:
    """max |found - expected| / max |expected|; places where both are the same infinity or both NaN count as
    equal.
    """
    a, b = np.asarray(found), np.asarray(expected)
    if a.shape != b.shape:
        return math.inf
    kind = np.complex128 if np.iscomplexobj(b) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    wild = ~(np.isfinite(a) & np.isfinite(b))
    if not np.array_equal(a[wild], b[wild], equal_nan=True):
        return math.inf
    a, b = a[~wild], b[~wild]
    gap, scale = (float(np.abs(x).max(initial=0.0)) for x in (a - b, b))
    return gap / scale if scale else (math.inf if gap else 0.0)
