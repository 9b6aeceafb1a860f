"""What a small model carries, and how it comes into a folder: the plans that cut it and the modes of its modules, in
the metadata of its weights.

The plans are texts, so that a model pickles without surgeon. Weights take their place by one rename; a folder is
thus always what one save wrote.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import InputError
from surgeon.files import locked, put, regular_target, sync, unwritable

PLANS = "_surgeon_plans"  # of a module: the texts of the plans that cut it
MODES = "surgeon.training"
SAVE = "surgeon.save"  # of weights in several files: one name for all files of a save
_TEXTS = re.compile(r"plan(-[1-9]\d*)?\.json")
_LARGEST_HEADER = 90_000_000  # bytes: safetensors reads no header of more than 100 MB


def plan_texts(model: nn.Module) -> tuple[str, ...]:
    """The plans that cut a model, as JSON, the first one first."""
    found: tuple[str, ...] = model.__dict__.get(PLANS, ())
    return found


def text_name(number: int) -> str:
    """The file of a plan in a folder."""
    return "plan.json" if number == 0 else f"plan-{number + 1}.json"


def plan_key(number: int) -> str:
    """The key of a plan in the metadata of weights."""
    return f"surgeon.{text_name(number).removesuffix('.json')}"


def metadata_of(small: nn.Module) -> dict[str, str]:
    """Plans and modes of a small model, for the metadata of its weights.

    Raises:
        InputError: it carries no plan, or plans that are too large.
    """
    texts = plan_texts(small)
    if not texts:
        raise InputError(
            "this model carries no plan",
            where=type(small).__name__,
            why="surgeon keeps what surgeon.shrink and Plan.apply gave; fused models and plain models hold no plan",
            fix="save the small model before fusing it, or use safetensors.torch.save_model for other models",
        )
    found = {plan_key(number): text for number, text in enumerate(texts)} | {MODES: json.dumps(_modes(small))}
    if sum(map(len, found.values())) > _LARGEST_HEADER:
        raise InputError(
            "the plans of this model are too large for one safetensors file", where=type(small).__name__,
            fix="make one plan of them: surgery.compose([...])",
        )  # fmt: skip
    return found


def _modes(model: nn.Module) -> dict[str, Any]:
    return {
        "training": model.training,
        "except": [name for name, module in model.named_modules() if module.training != model.training],
    }


def write_texts(small: nn.Module, draft: Path) -> None:
    """The plans for people and for `Plan.load`, beside the weights."""
    for number, text in enumerate(plan_texts(small)):
        (draft / text_name(number)).write_text(text)


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put more metadata into a safetensors file of a draft: the header is written anew, the tensors are copied.

    Raises:
        OSError: the file cannot be read or written.
    """
    new = path.with_name(f"{path.name}.new")
    with path.open("rb") as source, new.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **metadata}.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # as safetensors aligns the tensors
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 24)
    new.replace(path)


def publish(draft: Path, folder: Path, stale: Callable[[str], bool] = lambda name: False) -> None:
    """Put finished files in the places of those of an earlier save.

    What belongs to the earlier weights (plans, and files for whose names `stale` says so) goes first; the new
    weights come next, all else after them. So files of two saves never stand side by side.

    Raises:
        FileError: the folder cannot be written.
    """
    names = [f.relative_to(draft) for f in draft.rglob("*") if f.is_file() and f.name[:8] != ".surgeon"]
    weights = sorted(name for name in names if name.suffix == ".safetensors")
    others = sorted(set(names).difference(weights), reverse=True)
    with locked(folder):
        try:
            old = [f for f in folder.iterdir() if _TEXTS.fullmatch(f.name) or stale(f.name)]
            for file in (*(folder / name for name in names), *old):  # all of them before the first one goes
                regular_target(file)
            for file in old:
                file.unlink()
            for parent in {name.parent for name in names}:
                (folder / parent).mkdir(parents=True, exist_ok=True)
            sync(folder)
        except OSError as error:
            raise unwritable(folder, error) from error
        for name in (*weights, *others):  # an ONNX file's weights before the file that names them
            put(draft / name, folder / name)
