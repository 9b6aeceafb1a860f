"""Checkpoints: everything that a training needs to go on as if nothing had happened, in one file; no pickle
is loaded.

A file is written whole or not at all, so that a killed process leaves the last complete one. It begins with a
checksum; what follows are tensors, numbers and texts, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn

from surgeon.errors import InputError
from surgeon.files import write_atomically
from surgeon.graph.tensors import architecture

_MAGIC = b"surgeon-training-1\n"
_DIGEST = 32


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
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError("cannot read the checkpoint", where=str(path), why=str(error), fix=fix) from error
    start = len(_MAGIC) + _DIGEST
    if not raw.startswith(_MAGIC):
        raise InputError("this file is no checkpoint of surgeon.finetune", where=str(path), fix=fix)
    if hashlib.sha256(raw[start:]).digest() != raw[len(_MAGIC) : start]:
        raise InputError(
            "the checkpoint is damaged", where=str(path), why="its checksum does not match", fix=fix
        )
    try:
        found: dict[str, Any] = torch.load(io.BytesIO(raw[start:]), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        why = "it holds something else than tensors, numbers and texts (state of a module or optimizer of your own, perhaps)"
        raise InputError("this checkpoint cannot be loaded", where=str(path), why=why, fix=fix) from error
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


def identity_of(model: nn.Module) -> dict[str, str]:
    """What tells models apart that a checkpoint may not mix up: their tensors' names and shapes, and what was
    cut to make them."""
    cuts = hashlib.sha256()
    for plan in model.__dict__.get("_surgeon_plans", ()):
        kept = {
            name: {dim: list(map(int, index)) for dim, index in dims.items()}
            for name, dims in plan.kept.items()
        }
        cuts.update(repr((plan.hash, sorted(kept.items()))).encode())
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
