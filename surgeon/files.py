"""Files: written whole or not at all, read without pickle and within bounds; and libraries kept quiet while they
read or write.

A file takes its place by a rename, after its contents are on the disk. What is not finished yet lies in a hidden
folder beside the target (`.surgeon-...`), which its process holds a lock on, so that the next writer can tell the
folders of killed processes and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from surgeon.errors import FileError, InputError

_DRAFT = ".surgeon-"  # begins the names of folders of what is not finished
_LOCK = ".surgeon.lock"
_CLAIM = ".surgeon.claim"  # in a draft: the file that its process holds a lock on
_PATIENCE = 120.0  # seconds that a writer waits for another one to put its files in place
_CANNOT_WRITE = "choose a path that can be written"


# -- write ---------------------------------------------------------------------------------------------------


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old or the new content, never a part.

    Missing folders are made. A link is followed, and a file that is replaced keeps its permissions.

    Raises:
        FileError: the path cannot be written, or is no regular file (a folder, a device, a pipe, a circle of
            links).
    """
    target = regular_target(path)
    with draft_folder(target.parent) as draft:
        try:
            (draft / "new").write_bytes(data)
        except OSError as error:  # the disk is full, say
            raise unwritable(path, error) from error
        put(draft / "new", target)


def regular_target(path: str | os.PathLike[str]) -> Path:
    """Where a file of this path is written, links followed.

    Raises:
        FileError: there is something else than a regular file, or the path is none.
    """
    try:
        target = Path(os.path.realpath(path))
        there = target.lstat()  # a circle of links is what realpath leaves as a link
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise unwritable(path, error) from error
    if not stat.S_ISREG(there.st_mode):
        raise FileError(
            "cannot write the file",
            where=str(path),
            why=f"there is {_kind(there.st_mode)}",
            fix=_CANNOT_WRITE,
        )
    return target


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a circle of links",
    }  # fmt: skip
    return f"{kinds.get(stat.S_IFMT(mode), 'something')}, not a file"


def unwritable(path: str | os.PathLike[str], error: Exception) -> FileError:
    """What to raise where something cannot be written."""
    return FileError("cannot write the file", where=str(path), why=str(error), fix=_CANNOT_WRITE)


def put(source: Path, target: Path) -> None:
    """Move a finished file to its place, on the same disk: its content first, then its name, each for good.

    Raises:
        FileError: the place cannot be written.
    """
    try:
        sync(source)
        with contextlib.suppress(FileNotFoundError):
            os.chmod(source, stat.S_IMODE(target.stat().st_mode))
        os.replace(source, target)
        sync(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some file systems cannot be synced
            raise
    finally:
        os.close(handle)


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
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        yield
    finally:
        for empty in made:
            with contextlib.suppress(OSError):  # it holds a result
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


# -- read ----------------------------------------------------------------------------------------------------


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
                raise OSError(f"this is {_kind(there.st_mode)}")
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


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No prints, log lines or warnings from a library; errors still come out as exceptions."""
    level = logging.root.manager.disable
    sink = io.StringIO()
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, both of one version of it.

    Raises:
        InputError: the file is missing, damaged, or none.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("this is no regular file")
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(
            "cannot read the weights",
            where=str(path),
            why=str(error)[:400],
            fix="pass a safetensors file, as safetensors.torch.save_file(model.state_dict(), path) writes it",
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly; only a tied tensor may be in the file under one of its names.

    Raises:
        InputError: the file cannot be read, or does not fit.
    """
    fill(model, read_weights(path)[1], path)


def fill(model: nn.Module, loaded: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors of a file into a model, as `load_weights` does.

    Raises:
        InputError: they do not fit.
    """
    try:
        missing, unexpected = model.load_state_dict(loaded, strict=False)
    except RuntimeError as error:
        missing, unexpected, wrong = [], [], [line.strip() for line in str(error).splitlines()[1:]]
    else:
        own = model.state_dict(keep_vars=True)
        filled = {own[name].data_ptr() for name in loaded if name in own}
        wrong = [f"no {name} in the file" for name in missing if own[name].data_ptr() not in filled]
        wrong += [f"no {name} in the model" for name in unexpected]
    if wrong:
        raise InputError(
            "the weights do not fit the model",
            where=str(path),
            why="; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""),
            fix="pass the weights of this architecture, all of them",
        )
