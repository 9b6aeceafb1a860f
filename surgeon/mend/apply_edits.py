"""apply_edit(model, edit), and back: put the number of an `Edit` into a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import nn

from surgeon.mend.attribute_path import number_at, set_path
from surgeon.mend.edits import Edit, misfit
from surgeon.mend.methods.rewrite import edits_of, rewrite
from surgeon.mend.torch_layers import refresh


def apply_edit(model: nn.Module, edit: Edit) -> None:
    """Make one edit in `model`.

    Raises:
        MendError: the place does not hold the old number.
    """
    module = _module(model, edit)
    if edit.kind == "attribute":
        try:
            found = number_at(module, edit.name)
        except ValueError as error:
            raise misfit(edit, str(error)) from error
        if found not in (edit.old, edit.new):
            raise misfit(edit, f"it holds {found}")
        set_path(module, edit.name, edit.new)
        _derive(module)
        refresh(module, edit.module)
    else:
        rewrite(module, edit)


def _module(model: nn.Module, edit: Edit) -> nn.Module:
    """The module of an edit, by the names under which modules hold each other alone."""
    found: nn.Module | None = model
    for part in edit.module.split(".") if edit.module else ():
        found = None if found is None else dict(found._modules.items()).get(part)
    if found is None:
        raise misfit(edit, "there is no such module")
    return found


def _derive(module: nn.Module) -> None:
    """Where a module's class says what its state is and how it comes back from it (einops), compute anew what
    it derives.
    """
    for kind in type(module).__mro__:
        if {"__getstate__", "__setstate__"} <= vars(kind).keys() and not kind.__module__.startswith("torch."):
            held: Any = kind
            held.__setstate__(module, held.__getstate__(module))
            return


def undo_edits(model: nn.Module, edits: Collection[Edit]) -> None:
    """Put back what edits changed, whatever else was changed since."""
    for edit in edits:
        if edit.kind == "attribute":
            apply_edit(model, dataclasses.replace(edit, old=edit.new, new=edit.old))
    for path in {edit.module for edit in edits if edit.kind != "attribute"}:
        module = model.get_submodule(path)
        gone = [dataclasses.replace(edit, module="") for edit in edits if edit.module == path]
        left = [edit for edit in edits_of(module) if edit not in gone]
        module.__class__ = next(kind for kind in type(module).__mro__ if "_surgeon_edits" not in vars(kind))
        for edit in left:
            rewrite(module, edit)
