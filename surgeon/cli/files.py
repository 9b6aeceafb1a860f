"""Files of real inputs: .npy and .npz -> batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.cli.arrays import read_arrays
from surgeon.cli.reported import note
from surgeon.errors import InputError
from surgeon.graph.nests import map_tensors
from surgeon.graph.tensors import tensor_leaves


def batches_in(path: Path, size: int) -> list[Any]:
    """Inputs of `size` rows each: tensors of a .npy file, dicts of a .npz file.

    Raises:
        InputError: the file cannot be read, holds something else than numbers, or its arrays differ in length.
    """
    arrays = read_arrays(path)
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or not counts.copy().pop():
        raise InputError(
            "the arrays have no or different numbers of rows",
            where=str(path),
            why=f"they have {sorted(counts)}",
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    parts = [
        {name: t[start : start + size] for name, t in tensors.items()}
        for start in range(0, counts.pop(), size)
    ]
    return [part[""] if set(part) == {""} else part for part in parts]


def in_dtype_of(net: nn.Module, batches: list[Any]) -> list[Any]:
    """Floating-point data in the dtype of the model's weights: NumPy writes float64 unless it is told otherwise."""
    wanted = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
    given = {t.dtype for _, t in tensor_leaves(batches[0]) if t.is_floating_point()} - {wanted}
    if wanted is None or not given:
        return batches
    note(f"the data are {', '.join(map(str, given))} and the model {wanted}: they are taken as {wanted}")
    found: list[Any] = map_tensors(batches, lambda t: t.to(wanted) if t.is_floating_point() else t)
    return found
