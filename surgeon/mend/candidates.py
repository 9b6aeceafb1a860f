"""propose(small, notes, refused) -> edits: which numbers may explain the sizes that a small model's code got
wrong.

For each module with notes an integer attribute of it, or of one that holds it, that explains most of them;
else several attributes at once, because code computes with them; else a number in the source of its methods,
or in its traced forward, or the name of one at one place. Whether that was right shows when the model is run.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections import defaultdict

from torch import nn

from surgeon.graph.source_code import methods_as_written, uses
from surgeon.mend.attribute_path import integers
from surgeon.mend.checking.notes import Note, must_become
from surgeon.mend.code_candidates import in_code, in_source
from surgeon.mend.edits import Edit
from surgeon.mend.refused import Refused

_TRIALS = 8  # of attributes that may have to change together


def propose(small: nn.Module, notes: list[Note], refused: Refused) -> list[Edit]:
    """For each module with notes an attribute of it, else several; else of those that hold it; else a number
    in its code.
    """
    by_module: dict[str, list[Note]] = defaultdict(list)
    for note in notes:
        by_module[note.module].append(note)
    edits: dict[tuple[str, str, str], Edit] = {}
    for path, own in by_module.items():
        for found in _proposed(small, path, own, refused):
            edits.setdefault((found.module, found.kind, found.name), found)
    return list(edits.values())


def _proposed(small: nn.Module, path: str, notes: list[Note], refused: Refused) -> list[Edit]:
    widths = {size for tensor in small.get_submodule(path).parameters() for size in tensor.shape}
    own, owners = [path], _owners(path)
    one = (
        _attribute(small, own, notes, refused, widths, exact=True)
        or in_source(small, path, notes, refused, near=0)
        or _attribute(small, own, notes, refused, widths)
    )
    found = [one] if one else _together(small, path, own, notes, refused)
    if not found:  # a model's config holds many numbers that could be it
        one = (
            _attribute(small, owners, notes, refused, widths)
            or _below_it(small, path, notes, refused)
            or _apart_by(small, path, notes, refused, widths)
        )
        found = [one] if one else _together(small, path, owners, notes, refused)
    if not found:
        one = in_code(small, path, notes, refused)
        found = [one] if one else []
    return found


def _attribute(
    small: nn.Module,
    owners: list[str],
    notes: list[Note],
    refused: Refused,
    widths: set[int],
    exact: bool = False,
) -> Edit | None:
    """An attribute of the first of the owners that has one: which explains most notes, exact matches first.

    Of those that are divided somewhere, those that become a width of the module's parameters come first.
    `exact`: only one that is the very number.
    """
    for owner in owners:
        found_here: list[tuple[tuple[bool, bool, int, int], Edit]] = []
        for name, value in integers(small.get_submodule(owner)):
            if (owner, "attribute", name) in refused or value <= 0:
                continue
            for note in notes:
                found = None if exact and value != note.got else must_become(note, value)
                if found is None or found[0] == value:
                    continue
                new, times = found
                fits = sum(_explains(n, value, new) for n in notes)
                rank = (note.got >= value, note.got < value and new in widths, fits, -times)
                found_here.append((rank, Edit(owner, "attribute", name, value, new)))
        if found_here:
            most = max(rank for rank, _ in found_here)
            alike = [edit for rank, edit in found_here if rank == most]
            return alike[0] if len(alike) == 1 else _nearest(small, alike, notes)
    return None


def _nearest(small: nn.Module, edits: list[Edit], notes: list[Note]) -> Edit:
    """Of attributes of one module that explain as much the one that is read nearest to a noted line."""
    module = small.get_submodule(edits[0].module)
    lines = [note.source for note in notes if note.source is not None]
    away: dict[str, int] = {}
    for use in (use for method in methods_as_written(module).values() for use in uses(method, module)):
        nearest = min((abs(use.line - line) for file, line in lines if file == use.file), default=sys.maxsize)
        _, _, name = use.text.replace("[", ".").replace("]", "").partition(".")
        away[name] = min(nearest, away.get(name, sys.maxsize))
    return min(edits, key=lambda edit: away.get(edit.name, sys.maxsize))


def _apart_by(
    small: nn.Module, path: str, notes: list[Note], refused: Refused, widths: set[int]
) -> Edit | None:
    """An attribute to which the code adds a number, or takes one away: what is left of a width, or the rest
    to be padded.

    If the sum must change, only one that becomes a width.
    """
    for owner in _owners(path):
        for name, value in integers(small.get_submodule(owner)):
            for note in notes:
                new = value + note.want - note.got
                likely = new in widths if note.old != note.want else note.want != note.got
                if likely and new != value and new > 0 and (owner, "attribute", name) not in refused:
                    return Edit(owner, "attribute", name, value, new)
    return None


def _owners(path: str) -> list[str]:
    """A module and those that hold it, the model last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _together(
    small: nn.Module, path: str, owners: list[str], notes: list[Note], refused: Refused
) -> list[Edit]:
    """Attributes that hold the old numbers, all changed at once: where each alone was refused, code may
    compute with several.
    """
    changes = sorted({(note.got, note.want) for note in notes})
    if len(changes) < 2:
        return []
    held = [(owner, name, value) for owner in owners for name, value in integers(small.get_submodule(owner))]
    candidates = [
        [
            Edit(owner, "attribute", name, got, want)
            for owner, name, value in held
            if value == got and (owner, "attribute", name) not in refused.barred
        ]
        for got, want in changes
    ]
    candidates = [found for found in candidates if found]  # others may be sums of those
    if len(candidates) < 2:
        return []
    for edits in itertools.islice(itertools.product(*candidates), _TRIALS):
        key = (path, "attributes", " ".join(f"{edit.module}.{edit.name}" for edit in edits))
        if key not in refused:
            refused.add(key)  # tried once
            return list(edits)
    return []


def _below_it(small: nn.Module, path: str, notes: list[Note], refused: Refused) -> Edit | None:
    """An attribute of a module inside this one that holds the very number, if this one's code names it."""
    outer = small.get_submodule(path)
    methods = [
        f for kind in type(outer).__mro__ for f in vars(kind).values() if isinstance(f, types.FunctionType)
    ]
    named = {name for method in methods for name in method.__code__.co_names}
    for inner, module in outer.named_modules():
        owner = f"{path}.{inner}".strip(".")
        for name, value in integers(module):
            if owner == path or name.partition(".")[0] not in named or (owner, "attribute", name) in refused:
                continue
            for note in notes:
                if note.old == note.got == value:
                    return Edit(owner, "attribute", name, value, note.want)
    return None


def _explains(note: Note, value: int, new: int) -> bool:
    return note.got * new == note.want * value and (note.got % value == 0 or value % note.got == 0)
