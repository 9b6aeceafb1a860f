"""follow_with_plan(small): the small model's `save_pretrained` writes the plan too, where no config says its widths.

A library's `save_pretrained` writes a config and weights, and its `from_pretrained` builds the class from the config
alone. Where no config can say the small model's widths, that would build the original's. So this one small model
(not its class) gets a `save_pretrained` that calls the class's own, writes the config of the original and puts the
plans into the metadata of the weights: `surgeon.load(folder, factory)` restores it, and the factory is the class built
from that config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from surgeon.cut.carried import SAVE, add_metadata, metadata_of, plan_texts, publish, write_texts
from surgeon.cut.plan_schema import fields_of
from surgeon.errors import ConfigWarning, InputError, warn
from surgeon.files import draft_folder, unwritable
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.attribute_path import get_path
from surgeon.mend.edits import Edit

CONFIG_SAYS = (
    "config_says"  # in the request of a plan: the config of its small model says the widths that are left
)
_NAME = "save_pretrained"
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def follow_with_plan(small: nn.Module) -> None:
    """Let `small.save_pretrained` write the plans beside the weights, unless the config says the widths."""
    small.__dict__.pop(_NAME, None)  # of the model that was cut
    if callable(getattr(type(small), _NAME, None)) and not _config_says(small):
        small.__dict__[_NAME] = functools.partial(save_with_plan, small)


def _config_says(small: nn.Module) -> bool:
    plans = (fields_of(text) for text in plan_texts(small))
    return all(not plan["kept"] or plan["request"].get(CONFIG_SAYS) is True for plan in plans)


def save_with_plan(
    small: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """The class's own `save_pretrained`, and the plans: `surgeon.load(save_directory, factory)` reads what it wrote.

    Raises:
        InputError: what it writes would not load: it pushes to a hub at once, writes no safetensors files or a part
            of the weights (adapters alone), or the model carries no plan (it was fused).
        FileError: the folder cannot be written.
    """
    own: Callable[..., Any] = getattr(type(small), _NAME)
    kwargs = _as_state_dict_names(own, kwargs)
    given = inspect.signature(own).bind(small, save_directory, *args, **kwargs).arguments
    given = {**given.get("kwargs", {}), **given}
    if not given.get("is_main_process", True):
        return own(small, save_directory, *args, **kwargs)
    if given.get("push_to_hub"):
        raise InputError(
            "save_pretrained(push_to_hub=True) would push weights without the plan", where=type(small).__name__,
            why="the class's own method pushes before the plan is written", fix="call small.push_to_hub(repo_id)",
        )  # fmt: skip
    folder, metadata = Path(save_directory), metadata_of(small)
    with draft_folder(folder) as draft:
        with _config_of_the_original(small):
            result = own(small, str(draft), *args, **kwargs)
        _add_plans(small, draft, metadata)
        publish(draft, folder, _shards_of({file.name for file in draft.iterdir()}))
    warn(
        f"no config of {type(small).__name__} says the widths that are left, so from_pretrained would build the "
        f"original's: load this folder with {_how_to_load(small, folder)}",
        ConfigWarning,
    )
    return result


def _as_state_dict_names(own: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Weights under the model's own names, where the class would write those of an older format."""
    known = inspect.signature(own).parameters
    return ({"save_original_format": False} if "save_original_format" in known else {}) | kwargs


def _add_plans(small: nn.Module, draft: Path, metadata: dict[str, str]) -> None:
    written = [*draft.glob("*.safetensors")]
    if not written:
        raise InputError(
            "save_pretrained wrote no safetensors file, so that the plan has no place", where=type(small).__name__,
            why="no config says the widths that are left; the plan must stand beside the weights",
            fix="leave safe_serialization=False and the like out, or use surgeon.save(small, folder)",
        )  # fmt: skip
    _check_complete(small, written)
    if len(written) > 1:  # a save of the same plan that was killed in between must not pass for one of both
        metadata = {**metadata, SAVE: uuid.uuid4().hex}
    try:
        for file in written:
            add_metadata(file, metadata)
        write_texts(small, draft)
    except OSError as error:
        raise unwritable(draft.parent, error) from error


def _check_complete(small: nn.Module, files: Iterable[Path]) -> None:
    """What was written is the model's whole state, under its names, as `surgeon.load` reads it.

    Raises:
        InputError: it is a part of it (adapters without the base model, say), or has other names.
    """
    state = small.state_dict(keep_vars=True)
    names: set[str] = set()
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    held = {state[name].data_ptr() for name in names if name in state}
    wrong = [
        f"{name} is missing"
        for name, tensor in state.items()
        if name not in names and tensor.data_ptr() not in held
    ]
    wrong += [f"{name} is no name of the model's" for name in sorted(names - state.keys())]
    if wrong:
        raise InputError(
            "save_pretrained wrote weights that would not load again", where=type(small).__name__,
            why="; ".join(wrong[:2]) + (f"; and {len(wrong) - 2} more" if len(wrong) > 2 else ""),
            fix="use surgeon.save(small, folder), which keeps all; of adapters, merge them into the model first",
        )  # fmt: skip


def _shards_of(written: set[str]) -> Callable[[str], bool]:
    """Whether a file holds weights of an earlier save under the names that this one uses."""
    stems = {_SHARD.sub("", Path(name).stem) for name in written if name.endswith(".safetensors")}

    def stale(name: str) -> bool:
        stem, found, _ = name.partition(".safetensors")
        return bool(found) and _SHARD.sub("", stem) in stems and name not in written

    return stale


@contextlib.contextmanager
def _config_of_the_original(small: nn.Module) -> Iterator[None]:
    """The config says the numbers from before the first plan, so that the class built from it is what the plans cut."""
    undone = [
        edit for text in plan_texts(small) for edit in fields_of(text)["edits"] if _of_config(small, edit)
    ]
    done: list[Edit] = []
    try:
        for edit in reversed(undone):
            apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))
            done.append(edit)
        yield
    finally:
        for edit in reversed(done):
            apply_edit(small, edit)


def _of_config(small: nn.Module, edit: Edit) -> bool:
    """Whether an edit changed a number of the config that `save_pretrained` writes."""
    if edit.kind != "attribute" or "." not in edit.name:
        return False
    config = getattr(small, "config", None)
    held = (
        [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    )
    found = get_path(small.get_submodule(edit.module), edit.name.partition(".")[0])
    return any(found is one for one in held)


def _how_to_load(small: nn.Module, folder: Path) -> str:
    name, config = type(small).__name__, type(getattr(small, "config", None))
    made = f"{name}({config.__name__}.from_pretrained({str(folder)!r}))"
    factory = (
        f"lambda: {made}"
        if hasattr(config, "from_pretrained")
        else f"factory), where factory() makes the original {name}"
    )
    return f"surgeon.load({str(folder)!r}, {factory}" + (")" if factory.startswith("lambda") else "")
