"""Files of real inputs: numbers come as they are, anything else is one InputError, and no memory is taken first."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.cli.arrays import read_arrays
from surgeon.cli.files import batches_in
from surgeon.errors import InputError


def saved(array: object) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.asarray(array), allow_pickle=True)
    return sink.getvalue()


def header(shape: str, dtype: str = "<f4") -> bytes:
    """A .npy file that says that it holds more than it does."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def zipped(*members: tuple[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", kind) as file:
        for name, data in members:
            file.writestr(name, data)
    return sink.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">i2", "<i8", "|b1", "|u1", "<f2", "<c8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_come_as_they_are(tmp_path: Path, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(24).reshape(4, 3, 2) % 2, dtype=dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array, y=array[:, 0])
    np.savez_compressed(tmp_path / "b.npz", x=array)
    for found in (
        read_arrays(tmp_path / "a.npy")[""],
        read_arrays(tmp_path / "a.npz")["x"],
        read_arrays(tmp_path / "b.npz")["x"],
    ):
        assert np.array_equal(found, array) and found.dtype == array.dtype.newbyteorder("=")
    first, last = batches_in(tmp_path / "a.npy", 3)
    assert first.shape == (3, 3, 2) and last.shape == (1, 3, 2) and isinstance(first, torch.Tensor)


ROWS = saved(np.ones((4, 3), np.float32))
BAD: dict[str, tuple[bytes, str]] = {
    "more rows than bytes": (header("(1000000000000, 3)"), "takes 12,000,000,000,000 bytes"),
    "fewer rows than bytes": (ROWS + b"more", "the file has"),
    "a negative size": (header("(-1, 3)"), "takes"),
    "a size that is no number": (header("('a', 3)"), "shape"),
    "a deep header": (header("(" * 300), "cannot read the data"),
    "strings": (saved(["a", "bc"]), "not numbers"),
    "objects": (saved(np.array([{}, []], object)), "not numbers"),
    "records": (saved(np.zeros(3, [("a", "f4")])), "not numbers"),
    "dates": (saved(np.array(["2020-01-01"], "M8[D]")), "not numbers"),
    "long doubles": (saved(np.zeros(3, np.longdouble)), "not numbers"),
    "one number": (saved(np.float32(3)), "a single number"),
    "no rows": (saved(np.zeros((0, 3))), "no or different"),
    "nothing": (b"", "cannot read"),
    "text": (b"rows", "cannot read"),
    "a later format": (b"\x93NUMPY\x09\x00" + ROWS[8:], "version"),
    "an empty zip": (zipped(), "cannot read"),
    "a zip of text": (zipped(("a.npy", b"text")), "cannot read"),
    "a zip of objects": (zipped(("a.npy", saved(np.array([{}], object)))), "not numbers"),
    "a zip of lies": (zipped(("a.npy", header("(1000000000000, 3)"))), "takes"),
    "half a zip": (zipped(("a.npy", ROWS))[:-20], "cannot read"),
    "many members": (zipped(*((f"{i}.npy", ROWS) for i in range(1001))), "1 to 1000"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    data, words = BAD[name]
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        batches_in(tmp_path / "a.npy", 2)
    assert str(tmp_path / "a.npy") in str(caught.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A directory that says 16 GiB, whatever the members really hold."""
    whole = zipped(("a.npy", ROWS))
    size = len(ROWS).to_bytes(4, "little")
    place = whole.rindex(b"PK\x01\x02") + 24
    assert whole[place : place + 4] == size
    many = b"".join([whole[:place], (0xFFFFFFF0).to_bytes(4, "little"), whole[place + 4 :]])
    sink = io.BytesIO(many)
    (tmp_path / "a.npz").write_bytes(sink.getvalue())
    with pytest.raises(InputError, match=r"the file has|at most"):
        read_arrays(tmp_path / "a.npz")


def test_encrypted_members_and_what_is_no_file(tmp_path: Path) -> None:
    locked = bytearray(zipped(("a.npy", ROWS), kind=zipfile.ZIP_STORED))
    locked[6] |= 1
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(bytes(locked))
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "a.npz", "encrypted"), (tmp_path / "pipe", "no regular file"), (tmp_path, "no regular file"),
        (tmp_path / "none", "No such file"), (Path("/dev/zero"), "no regular file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_arrays(path)


WHOLE = [ROWS, zipped(("a.npy", ROWS)), zipped(("a.npy", ROWS), ("b.npy", ROWS), kind=zipfile.ZIP_STORED)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WHOLE), st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damaged_files(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, at: int, by: int, short: bool
) -> None:
    """One byte changed, or the end missing: an InputError, or arrays."""
    at %= len(whole)
    data = whole[:at] if short else whole[:at] + bytes([whole[at] ^ by]) + whole[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        found = read_arrays(path)
    except InputError:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())
