"""save(small, folder), load(folder, factory): a small model on disk, as the plans that cut it and its weights.

The class need not know how to build itself smaller: `load` builds the original and replays the plans, so that
per-layer widths, which no configuration can say, come back as they were. There is no pickle.

One file is the truth: `model.safetensors` holds the weights and, in its metadata, the plans and which modules were
in training mode. It takes its place by one rename, so that a folder is always what one save wrote. `plan.json` is the
same plan for people and for `Plan.load`; it goes before new weights come and comes after them.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from surgeon.cut.carried import MODES, metadata_of, plan_key, publish, text_name, write_texts
from surgeon.cut.plan import Plan
from surgeon.errors import InputError, PlanError, SurgeonError
from surgeon.files import draft_folder, fill, read_weights, unwritable
from surgeon.graph.given import FACTORY, MODEL, PATH, check_given, said

WEIGHTS = "model.safetensors"
Change = Callable[[nn.Module], object]
_ATTEMPTS = 20
_NOT_THESE = (
    "make the original in the factory; what changed shapes or names between the cut and the save (a new head, say) goes "
    "into after_cut: surgeon.load(folder, factory, after_cut=lambda small: ...)"
)


def save(small: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `model.safetensors`, which `load` reads, and `plan.json` (`plan-2.json`, ... for a model that was cut
    several times), which says the same plan in plain text.

    Whatever happens meanwhile, the folder holds what one save wrote: the earlier or this one.

    Args:
        small: what `shrink` or `Plan.apply` gave, trained or recovered since, perhaps.
        folder: made if it is not there; files of these names are replaced.

    Raises:
        InputError: the model was not made by surgeon, or its state holds something else than tensors.
        FileError: the folder cannot be written.
    """
    check_given("surgeon.save(small, folder)", small=(small, MODEL), folder=(folder, PATH))
    path, metadata, state = Path(folder), metadata_of(small), plain_state(small)
    with draft_folder(path) as draft:
        write(small, draft, state, metadata)
        publish(draft, path)
    return path


def write(
    small: nn.Module,
    draft: Path,
    state: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the files of a save into a folder of its own.

    Raises:
        InputError: the state holds something else than tensors, or the plans are too large.
        FileError: the folder cannot be written.
    """
    header = dict(metadata_of(small) if metadata is None else metadata)
    tensors = dict(plain_state(small) if state is None else state)
    try:
        safetensors.torch.save_file(tensors, draft / WEIGHTS, {"format": "pt", **header})
        _order_header(draft / WEIGHTS)
        write_texts(small, draft)
    except (OSError, safetensors.SafetensorError) as error:
        raise unwritable(draft.parent, error) from error


def _order_header(path: Path) -> None:
    """Put the metadata of a safetensors file in order, so that equal models are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else it says its texts in another way, and stays as it is
            file.seek(8)
            file.write(text.ljust(size))


def load(
    folder: str | os.PathLike[str],
    factory: Callable[[], nn.Module],
    *,
    after_cut: Change | Sequence[Change | None] | None = None,
) -> nn.Module:
    """The model that `save` wrote, in the mode (training or eval) of each module and the dtypes that it had.

    Args:
        folder: where.
        factory: makes the original model, with any weights.
        after_cut: does to the small model what was done to it between the cut and the save and changed its shapes or
            names, in place (a new head: `lambda small: small.reset_classifier(7)`). Of a model that was cut several
            times: a list with one for each cut, None where nothing was done.

    Raises:
        PlanError: a plan is missing, was changed, or does not fit what the factory makes.
        InputError: the weights do not fit.
    """
    call = "surgeon.load(folder, factory)"
    check_given(call, folder=(folder, PATH), factory=(factory, FACTORY))
    path = Path(folder)
    model = _made(factory, call)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the factory makes a model without values",
            why="buffers that are not saved (position tables, say) are needed as the model makes them",
            fix="make the model on the CPU",
        )
    plans, modes, tensors = _read(path)
    for plan, change in zip(plans, _changes(after_cut, len(plans)), strict=True):
        model = plan.apply(model)
        if change is not None:
            change(model)
    own = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name in own and own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)
    fill(model, tensors, path, _NOT_THESE)
    _set_modes(model, modes, path)
    return model


def _changes(after_cut: Change | Sequence[Change | None] | None, cuts: int) -> list[Change | None]:
    """What to do after each cut.

    Raises:
        InputError: it is no function, or they are not as many as the cuts.
    """
    if after_cut is None or callable(after_cut):
        return [None] * (cuts - 1) + [after_cut]
    found = [*after_cut] if isinstance(after_cut, Sequence) else []
    if len(found) != cuts or not all(change is None or callable(change) for change in found):
        raise InputError(
            f"after_cut is {said(after_cut)}", where="surgeon.load(folder, factory, after_cut=...)",
            why=f"this model was cut {cuts} time{'s' * (cuts > 1)}",
            fix="pass a function of the small model, for the last cut, or a list with a function or None for each cut",
        )  # fmt: skip
    return found


def _made(factory: Callable[[], nn.Module], call: str) -> nn.Module:
    """What the factory gives.

    Raises:
        InputError: it needs arguments, or gives no model.
    """
    try:
        arguments = inspect.signature(factory)
    except ValueError:  # a class of C may say nothing of its arguments
        arguments = inspect.Signature()
    try:
        arguments.bind()
    except TypeError as error:
        name = getattr(factory, "__name__", "the factory")
        raise InputError(
            f"{name} cannot be called without arguments", where=call, why=str(error),
            fix=f"pass the arguments in a lambda: surgeon.load(folder, lambda: {name}(...))",
        ) from error  # fmt: skip
    model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory gave {said(model)}, not a model", where=call, fix=FACTORY.how)
    return model


def _read(folder: Path) -> tuple[list[Plan], Any, dict[str, Tensor]]:
    """(plans, modes, weights) of one save, though others may be writing."""
    for _ in range(_ATTEMPTS):
        files = _weights_in(folder)
        if not files:
            break
        try:
            metadata, tensors = _together({file: read_weights(file) for file in files}, folder)
            plans = _plans(metadata, folder)
            _check_texts(folder, plans)
        except SurgeonError:
            if _weights_in(folder) != files:  # another save came between the two
                continue
            raise
        return plans, _modes_in(metadata, folder), tensors
    raise PlanError(
        "there is no saved model",
        where=str(folder),
        fix="pass a folder that surgeon.save(small, folder) wrote",
    )


def _weights_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """The files with the weights, and what tells one save of them from another: `model.safetensors`; without it those
    that a library's `save_pretrained` wrote under other names, or in parts.
    """
    found = {}
    try:
        whole = folder / WEIGHTS
        for file in [whole] if os.path.exists(whole) else sorted(folder.glob("*.safetensors")):
            stat = file.stat()
            found[file] = stat.st_ino, stat.st_mtime_ns
    except OSError:  # it is gone
        return {}
    return found


def _together(
    parts: Mapping[Path, tuple[dict[str, str], dict[str, Tensor]]], folder: Path
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, weights) of the files of one save."""
    (metadata, tensors), *rest = parts.values()
    for more, others in rest:
        if more != metadata or others.keys() & tensors.keys():
            raise PlanError(
                "the weights in this folder are of several saves", where=f"{folder}: {', '.join(f.name for f in parts)}",
                why="their plans, or the times of saving, differ" if more != metadata else "several files hold the same tensors",
                fix=f"leave the files of one save there, or name the weights {WEIGHTS}",
            )  # fmt: skip
        tensors |= others
    return metadata, tensors


def _plans(metadata: Mapping[str, str], where: Path) -> list[Plan]:
    plans: list[Plan] = []
    while plan_key(len(plans)) in metadata:
        plans.append(Plan.from_json(metadata[plan_key(len(plans))], where=f"{where}: {plan_key(len(plans))}"))
    if not plans:
        raise PlanError(
            "these weights hold no plan", where=str(where), why="surgeon.save did not write this file, or an older one did",
            fix='apply the plan and load the weights yourself: small = Plan.load("plan.json").apply(model); '
            "small.load_state_dict(safetensors.torch.load_file(path))",
        )  # fmt: skip
    return plans


def _check_texts(folder: Path, plans: Iterable[Plan]) -> None:
    """Refuse a `plan.json` that says something else than the weights do: somebody changed or moved one of them."""
    for path, plan in ((folder / text_name(number), plan) for number, plan in enumerate(plans)):
        try:
            same = not os.path.exists(path) or Plan.load(path) == plan
        except PlanError:
            if os.path.exists(path):
                raise
            continue  # another writer has just removed it
        if not same:
            raise PlanError(
                "the plan in this folder is not that of the weights", where=str(path), why="they were saved with another one",
                fix=f"remove {path.name} (the weights hold their own plan), or save the model anew",
            )  # fmt: skip


def _modes_in(metadata: Mapping[str, str], where: Path) -> Any:
    try:
        found = json.loads(metadata.get(MODES, ""))
        if isinstance(found["training"], bool) and all(isinstance(name, str) for name in found["except"]):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # it is told below
    why = f"their metadata {MODES!r} holds something else"
    raise PlanError(
        "the weights do not say in which mode the modules were", where=str(where), why=why,
        fix="load a folder that surgeon.save(small, folder) wrote, as it is",
    )  # fmt: skip


def _set_modes(model: nn.Module, modes: Any, where: Path) -> None:
    modules = dict(model.named_modules())
    for name in modes["except"]:
        if name not in modules:
            raise PlanError(f"the model has no module {name[:100]!r}", where=f"{where}: {MODES}")
    for name, module in modules.items():
        module.training = modes["training"] != (name in modes["except"])


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with a copy for each name (safetensors refuses shared memory): it loads strictly, tied
    weights included.

    Raises:
        InputError: it holds something else than tensors.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"the state of the model holds a {type(value).__name__}",
                where=name,
                why="safetensors files hold tensors only",
                fix="keep such state out of get_extra_state, or save it beside the weights",
            )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
