"""Files written whole or not at all: a file takes its place by a rename, after its contents are on the disk."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

from surgeon.errors import FileError
from surgeon.files.drafts import CANNOT_WRITE, draft_folder, unwritable
from surgeon.files.reading import kind


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
            why=f"there is {kind(there.st_mode)}",
            fix=CANNOT_WRITE,
        )
    return target


def put(source: Path, target: Path) -> None:
    """Move a finished file to its place, on the same disk: its content first, then its name, each for good.

    Raises:
        FileError: the place cannot be written.
    """
    try:
        sync(source)
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            mode = _mode_of_new_files(source.parent)
        os.chmod(source, stat.S_IMODE(mode))
        os.replace(source, target)
        sync(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error


def _mode_of_new_files(folder: Path) -> int:
    """What the process's umask leaves of 0666, seen at a file: libraries write theirs for the owner alone."""
    probe = folder / f".surgeon-mode-{uuid.uuid4().hex}"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        return os.fstat(handle).st_mode
    finally:
        os.close(handle)
        probe.unlink()


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
