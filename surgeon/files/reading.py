"""Files read whole, within bounds."""

from __future__ import annotations

import os
import stat

from surgeon.errors import FileError


def kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a circle of links",
    }  # fmt: skip
    return f"{kinds.get(stat.S_IFMT(mode), 'something')}, not a file"


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        FileError: it is missing, something else than a file, larger, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for a writer
        try:
            there = os.fstat(handle)
            if not stat.S_ISREG(there.st_mode):
                raise OSError(f"this is {kind(there.st_mode)}")
            if there.st_size > limit:
                raise OSError(f"the file has {there.st_size:,} bytes; at most {limit:,} are read")
            with open(handle, "rb", closefd=False) as file:
                data = file.read(there.st_size + 1)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise FileError("cannot read the file", where=str(path), why=str(error)) from error
    if len(data) != there.st_size:
        raise FileError("cannot read the file", where=str(path), why="it changed while it was read")
    return data
