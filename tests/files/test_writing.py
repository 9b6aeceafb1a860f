"""Writing whole or not at all; what may be written to and read; what killed writers leave."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import surgeon
from surgeon.errors import FileError
from surgeon.files import draft_folder, locked, read_file, write_atomically


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["file"]


def _umask() -> int:
    return int(subprocess.check_output(["sh", "-c", "umask"]), 8)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "ahead").symlink_to("deep/new")
    write_atomically(tmp_path / "link", b"new")
    write_atomically(tmp_path / "ahead", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "deep" / "new").read_bytes() == b"new"


def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "file").write_bytes(b"x")
    before = sorted(os.listdir(tmp_path))
    for path, words in (
        (tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (tmp_path / "loop", "a circle of links"),
        (tmp_path / "device", "a device"), (Path("/dev/null"), "a device"), (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 300), "too long"), (tmp_path / "a\0b", "null"), (Path("/proc/none/x"), "cannot write"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=words):
            write_atomically(path, b"data")
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    with pytest.raises(FileError, match="No space"):
        write_atomically(tmp_path / "folder" / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", b"data")
    assert [Path(step).name for step in done] == ["new", "replace", tmp_path.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from surgeon.files import draft_folder
with draft_folder(Path(sys.argv[1])) as draft:
    (draft / "half").write_bytes(b"x" * 1000)
    print(draft, flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_the_drafts_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(surgeon.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    living = subprocess.Popen(
        [*command, "live"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert living.stdout is not None
        held = Path(living.stdout.readline().strip())
        dead = subprocess.run([*command, "die"], env=env, capture_output=True, text=True, timeout=60)
        assert dead.returncode == -9 and Path(dead.stdout.strip()).is_dir()
        write_atomically(tmp_path / "file", b"data")
        assert held.is_dir() and sorted(os.listdir(tmp_path)) == sorted([held.name, "file"])
    finally:
        living.communicate("")
    assert os.listdir(tmp_path) == ["file"]


def add(path: str, count: int) -> None:
    """Count in a file, one by one."""
    for _ in range(count):
        with locked(Path(path).parent):
            now = int(read_file(path, 100))
            write_atomically(path, str(now + 1).encode())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_bytes(b"0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add, args=(str(path), 25)) for _ in range(3)]
    workers += [threading.Thread(target=add, args=(str(path), 25)) for _ in range(2)]  # type: ignore[list-item]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert path.read_bytes() == b"125" and os.listdir(tmp_path) == ["count"]


def test_a_lock_that_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon.files.drafts, "_PATIENCE", 0.05)
    with locked(tmp_path), pytest.raises(FileError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".surgeon.lock"]


def test_writers_that_start_at_once_do_not_take_each_others_drafts(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(30):
                with draft_folder(tmp_path) as draft:
                    (draft / "x").write_bytes(b"1")
                    assert (draft / "x").read_bytes() == b"1"
        except Exception as error:  # noqa: BLE001  # threads hand theirs over
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == []


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "file", 100) == b"x" * 100
    for path, words in (
        (tmp_path / "file", "at most 99"), (tmp_path / "none", "No such file"), (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=words):
            read_file(path, 99)
