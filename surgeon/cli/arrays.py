"""read_arrays(path) -> the arrays of a .npy or .npz file: numbers alone, within bounds, without pickle.

What a file says of itself is held against its size before any memory is taken for it.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from surgeon.errors import InputError

_SMALL, _LARGE = 256 << 20, 8 << 30  # bytes that compressed arrays may have in all, whatever the file's size
_TIMES = 50  # as many as the file has, in between
_MEMBERS = 1000
_DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)
_DAMAGED = (
    OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, NotImplementedError, SyntaxError, RecursionError,
    MemoryError, OverflowError, tokenize.TokenError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The array of a .npy file under the name "", the arrays of a .npz file by their names.

    Raises:
        InputError: the file is missing, no such file, damaged, encrypted, larger than it may be, or holds something
            else than rows of numbers.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("this is no regular file")
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                return {"": _array(file, path.stat().st_size)}
            with zipfile.ZipFile(file) as members:
                return dict(_members(members, path.stat().st_size))
    except _DAMAGED as error:
        fix = "pass a file written by numpy.save (one input) or numpy.savez (inputs by name), with rows along dim 0"
        why = str(error)[:300] or type(error).__name__
        raise InputError("cannot read the data", where=str(path), why=why, fix=fix) from error


def _members(members: zipfile.ZipFile, size: int) -> Iterator[tuple[str, NDArray[Any]]]:
    found = members.infolist()
    if not found or len(found) > _MEMBERS:
        raise ValueError(f"it holds {len(found)} arrays; 1 to {_MEMBERS} are read")
    if sum(item.compress_size for item in found) > size:
        raise ValueError("its arrays take more bytes than it has: they lie over each other")
    whole, most = sum(item.file_size for item in found), max(_SMALL, min(_LARGE, _TIMES * size))
    if whole > max(size, most):
        raise ValueError(
            f"its arrays have {whole:,} bytes; of a file of {size:,} bytes at most {most:,} are read"
        )
    for item in found:
        if item.flag_bits & 1:
            raise ValueError("it is encrypted")
        with contextlib.closing(members.open(item)) as file:
            yield item.filename.removesuffix(".npy"), _array(file, item.file_size)


def _array(file: IO[bytes], size: int) -> NDArray[Any]:
    """The array of an open file of this size."""
    file.seek(0)
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in header:
        raise ValueError(f"version {version} of the format is not read")
    shape, columns_first, dtype = header[version](file)
    if dtype.newbyteorder("=").name not in _DTYPES:
        raise ValueError(f"it holds {dtype}, not numbers that torch knows")
    if not shape:
        raise ValueError("it holds a single number, not rows")
    start, needed = file.tell(), math.prod(shape) * dtype.itemsize
    if start + needed != size:
        raise ValueError(f"an array of shape {shape} takes {needed:,} bytes; the file has {size - start:,}")
    data = io.BytesIO(file.read(needed)).getbuffer()
    flat = np.frombuffer(data, dtype, math.prod(shape))
    flat = flat.astype(dtype.newbyteorder("="), copy=False)
    return flat.reshape(shape[::-1]).T if columns_first else flat.reshape(shape)
