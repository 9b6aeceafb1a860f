"""Checkpoints from anywhere: with a checksum that fits, what they hold is still refused unless it is a training's."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgeon
from surgeon.errors import InputError

X = torch.linspace(-1, 1, 24).reshape(4, 6)
BATCHES = [(X, torch.tensor([0, 1, 2, 0]))]
_MAGIC = b"surgeon-training-1\n"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(path: Path) -> None:
    surgeon.finetune(net(), BATCHES, epochs=2, checkpoint=path)


def signed(data: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(data).digest() + data


def packed(state: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("checkpoint") / "run.ckpt"
    train(path)
    return torch.load(io.BytesIO(path.read_bytes()[len(_MAGIC) + 32 :]), weights_only=True)


def recompressed(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return sink.getvalue()


def test_other_contents_are_refused(tmp_path: Path, whole: Any) -> None:
    path = tmp_path / "run.ckpt"
    good = packed(whole)
    for data in (
        b"", b"PK", b"x" * 1000, good[:-100], good[: len(good) // 2], packed([1, 2]), packed({"identity": {}}), packed("text"),
        packed({"identity": 1, "state": {}}), packed({"identity": whole["identity"], "state": []}), recompressed(good),
    ):  # fmt: skip
        path.write_bytes(signed(data))
        with pytest.raises(InputError, match="cannot be loaded"):
            train(path)
    path.write_bytes(signed(good))
    train(path)


JUNK = st.sampled_from(
    [None, 1, -1, 2.5, "text", [], {}, (), (1, 2), torch.ones(2), {"a": torch.ones(1)}, True]
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_state_with_other_parts(
    tmp_path_factory: pytest.TempPathFactory, whole: Any, data: st.DataObject
) -> None:
    """Each part of the state replaced or missing: an InputError, or a part that this run does not read."""
    state = dict(whole["state"])
    name = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        state[name] = data.draw(JUNK)
    else:
        del state[name]
    path = tmp_path_factory.getbasetemp() / "other.ckpt"
    path.write_bytes(signed(packed({**whole, "state": state})))
    try:
        train(path)
    except InputError as error:
        assert str(path) in str(error)


def test_devices_are_not_read() -> None:
    with pytest.raises(InputError, match="a device"):
        train(Path("/dev/zero"))
