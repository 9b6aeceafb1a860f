"""Drafts: hidden folders for what is not finished yet, and locks between writers.

What is not finished lies in a hidden folder beside the target (`.surgeon-...`), which its process holds a lock on, so
that the next writer can tell the folders of killed processes and removes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from surgeon.errors import FileError

_DRAFT = ".surgeon-"  # begins the names of folders of what is not finished


_LOCK = ".surgeon.lock"


_CLAIM = ".surgeon.claim"  # in a draft: the file that its process holds a lock on


_PATIENCE = 120.0  # seconds that a writer waits for another one to put its files in place


CANNOT_WRITE = "choose a path that can be written"


def unwritable(path: str | os.PathLike[str], error: Exception) -> FileError:
    """What to raise where something cannot be written."""
    return FileError("cannot write the file", where=str(path), why=str(error), fix=CANNOT_WRITE)


@contextlib.contextmanager
def draft_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` for what is not finished; gone in the end, and with it those of killed
    processes.

    Raises:
        FileError: the folder cannot be written.
    """
    with _made(folder):
        try:
            for entry in folder.iterdir():
                if entry.name.startswith(_DRAFT) and (lock := _claimed(entry)) is not None:
                    _remove(entry, lock)  # its process is gone
            lock = None
            while lock is None:  # another writer may take it for one of a killed process before it is claimed
                draft = Path(tempfile.mkdtemp(dir=folder, prefix=_DRAFT))
                lock = _claimed(draft)
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            yield draft
        finally:
            _remove(draft, lock)


def _claimed(draft: Path) -> int | None:
    """A handle that holds the draft's lock; None if its process lives, or it is gone."""
    try:
        handle = os.open(draft / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # it is gone, or another user's
        return None
    if _lock(handle, draft / _CLAIM):
        return handle
    os.close(handle)
    return None


def _lock(handle: int, path: Path) -> bool:
    """Whether the lock of an open file could be had, and the file is still the one of this path."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove(draft: Path, lock: int) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # another's may be there, or be read-only
    os.close(lock)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there; it and those that hold it are removed again if nothing came into them."""
    made = [f for f in (folder, *folder.parents) if not os.path.exists(f)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            raise unwritable(folder, error) from error
        yield
    finally:
        for empty in made:
            with contextlib.suppress(OSError, ValueError):  # it holds a result
                empty.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time: others (processes and threads) that lock the folder wait.

    Raises:
        FileError: the folder cannot be written, or another process holds it for two minutes.
    """
    path, end = folder / _LOCK, time.monotonic() + _PATIENCE
    handle = -1
    try:
        while handle < 0:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if not _lock(handle, path):
                os.close(handle)
                handle = -1
                if time.monotonic() > end:
                    raise TimeoutError("another process has been writing there for two minutes")
                time.sleep(0.005)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
