"""Files of real inputs: .npy and .npz -> batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from surgeon.cli.arrays import read_arrays
from surgeon.errors import InputError


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
