"""Checkpoints: everything that a training needs to go on as if nothing had happened, in one file; no pickle
is loaded.

A file is written whole or not at all, so that a killed process leaves the last complete one. It begins with a
checksum; what follows are tensors, numbers and texts, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn

from surgeon.cut.carried import plan_texts
from surgeon.cut.plan import Plan
from surgeon.errors import FileError, InputError
from surgeon.files import read_file, write_atomically
from surgeon.graph.tensors import architecture

_MAGIC = b"surgeon-training-1\n"
_DIGEST = 32
_LARGEST = 1 << 40  # bytes


def save_checkpoint(
    path: str | os.PathLike[str], state: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Write a state, with what it is the state of.

    Raises:
        FileError: the path cannot be written.
    """
    sink = io.BytesIO()
    torch.save({"identity": dict(identity), "state": dict(state)}, sink)
    data = sink.getvalue()
    write_atomically(Path(path), _MAGIC + hashlib.sha256(data).digest() + data)


def load_checkpoint(path: str | os.PathLike[str], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises:
        InputError: the file cannot be read, is no checkpoint, is damaged, or is one of another model, plan or
            run; the differences are named.
    """
    fix = "pass another path, or remove the file to train from the start"
    try:
        raw = read_file(path, _LARGEST)
    except FileError as error:
        raise InputError("cannot read the checkpoint", where=str(path), why=error.why, fix=fix) from error
    start = len(_MAGIC) + _DIGEST
    if not raw.startswith(_MAGIC):
        raise InputError("this file is no checkpoint of surgeon.finetune", where=str(path), fix=fix)
    if hashlib.sha256(raw[start:]).digest() != raw[len(_MAGIC) : start]:
        raise InputError(
            "the checkpoint is damaged", where=str(path), why="its checksum does not match", fix=fix
        )
    found = _loaded(raw[start:], str(path), fix)
    theirs = found["identity"]
    differences = [
        f"{name}: {theirs.get(name)!r} there, {identity.get(name)!r} here"
        for name in sorted({*theirs, *identity})
        if theirs.get(name) != identity.get(name)
    ]
    if differences:
        raise InputError(
            "the checkpoint is one of another model or run",
            where=str(path),
            why="; ".join(differences),
            fix=fix,
        )
    state: dict[str, Any] = found["state"]
    return state


def _loaded(data: bytes, where: str, fix: str) -> dict[str, dict[str, Any]]:
    """The two parts of a checkpoint, without running what a pickle says."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                raise ValueError("its members are compressed, which torch.save never does")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        why = "it holds something else than tensors, numbers and texts (state of a module or optimizer of your own, perhaps)"
        raise InputError("this checkpoint cannot be loaded", where=where, why=why, fix=fix) from error
    except _DAMAGED as error:
        why = f"{type(error).__name__}: {str(error)[:300]}"
        raise InputError("this checkpoint cannot be loaded", where=where, why=why, fix=fix) from error
    if not isinstance(found, dict) or not all(
        isinstance(found.get(part), dict) for part in ("identity", "state")
    ):
        why = "it holds no identity and state of a training"
        raise InputError("this checkpoint cannot be loaded", where=where, why=why, fix=fix)
    return found


@contextlib.contextmanager
def restoring(path: str | os.PathLike[str]) -> Iterator[None]:
    """What cannot be put back, because a state of the right identity lacks it or holds something else, is the
    checkpoint's fault.
    """
    try:
        yield
    except _DAMAGED as error:
        raise InputError(
            "this checkpoint does not hold the state of this run",
            where=str(path),
            why=f"{type(error).__name__}: {str(error)[:300]}",
            fix="remove the file to train from the start",
        ) from error


def check_progress(state: Mapping[str, Any]) -> None:
    """Whether a state says how far a training came.

    Raises:
        ValueError: it does not; TypeError, KeyError: the same.
    """
    kept, best, stopped = state["kept"]
    done, sums = state["progress"]
    numbers = [*sums, *(value for epoch in state["history"] for value in epoch if value is not None)]
    sound = (
        isinstance(kept, int) and isinstance(stopped, str) and isinstance(done, int) and done >= 0
        and len(sums) == 4 and all(len(epoch) == 5 for epoch in state["history"])
        and all(isinstance(number, int | float) for number in numbers)
        and (best is None or (isinstance(best[0], int | float) and isinstance(best[1], dict)))
    )  # fmt: skip
    if not sound:
        raise ValueError("its history or progress is none")


# what torch.load and the load_state_dicts of models and optimizers raise on other data than they wrote
_DAMAGED = (
    EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, zipfile.BadZipFile,
)  # fmt: skip


def identity_of(model: nn.Module) -> dict[str, str]:
    """What tells models apart that a checkpoint may not mix up: their tensors' names and shapes, and what was
    cut to make them."""
    cuts = hashlib.sha256()
    for text in plan_texts(model):
        plan = Plan.from_json(text, type(model).__name__)
        cuts.update(repr((plan.hash, sorted(plan.kept.items()))).encode())
    return {"model": architecture(model), "plans": cuts.hexdigest()[:16]}


def random_states() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, as tensors, numbers and texts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
