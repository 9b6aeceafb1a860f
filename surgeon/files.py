"""Files: atomic writing, reading without pickle, and libraries kept quiet while they read or write."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from surgeon.errors import InputError, PlanError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    Raises:
        PlanError: the path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise PlanError(
            "cannot write the file", where=str(path), why=str(error), fix="choose a path that can be written"
        ) from error


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


def load_weights(model: nn.Module, path: Path) -> None:
    """Strictly; only a tied tensor may be in the file under one of its names."""
    try:
        loaded = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            "cannot read the weights",
            where=str(path),
            why=str(error),
            fix="pass a safetensors file, as safetensors.torch.save_file(model.state_dict(), path) writes it",
        ) from error
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
