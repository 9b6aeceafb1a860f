"""Trials: edits that may help are made in the small model, and a run shows which of them do."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable

from torch import nn

from surgeon.errors import MendError
from surgeon.mend.apply_edits import apply_edit, undo_edits
from surgeon.mend.candidates import propose
from surgeon.mend.checking.notes import Note
from surgeon.mend.checking.size_check import Findings
from surgeon.mend.edits import Edit
from surgeon.mend.refused import Refused, key

_PAIRS = 4  # second attributes that are tried with a first one


def try_edits(
    small: nn.Module,
    trial: list[Edit],
    before: Findings,
    refused: Refused,
    look: Callable[[], Findings],
) -> tuple[list[Edit], Findings]:
    """Make the edits of a trial that help, and tell what is left to change; the others are undone and
    refused.
    """
    made = _make(small, trial, refused)
    after = Findings([], [])
    try:
        after = look()
        worse = _worse(before.notes, after.notes, made)
    except MendError:  # one of them leads the code astray
        worse = made
    if worse and len(made) == 1:
        together = _with_others(small, made[0], before.notes, after.notes, refused, look)
        if together is not None:
            return together
    undo_edits(small, worse)
    if len(worse) == len(made) > 1:
        return _apart(small, made, before, refused, look)
    refused.add(*map(key, worse))
    return [edit for edit in made if edit not in worse], look() if worse else after


def _apart(
    small: nn.Module,
    edits: list[Edit],
    before: Findings,
    refused: Refused,
    look: Callable[[], Findings],
) -> tuple[list[Edit], Findings]:
    """Find out which edits of a trial help. Of those that are alike (one class, one change) all are refused
    if two are.
    """
    families: dict[tuple[type, str, str, int, int], list[Edit]] = defaultdict(list)
    for edit in edits:
        families[type(small.get_submodule(edit.module)), edit.kind, edit.name, edit.old, edit.new].append(
            edit
        )
    kept: list[Edit] = []
    for first, *rest in families.values():
        found, before = try_edits(small, [first], before, refused, look)
        if not found and len(rest) > 1:
            found, before = try_edits(small, [rest.pop()], before, refused, look)
            if not found:
                refused.add(*map(key, rest))
                rest = []
        kept += found
        if rest:
            found, before = try_edits(small, rest, before, refused, look)
            kept += found
    return kept, before


def _with_others(
    small: nn.Module,
    edit: Edit,
    before: list[Note],
    after: list[Note],
    refused: Refused,
    look: Callable[[], Findings],
) -> tuple[list[Edit], Findings] | None:
    """Change numbers for the sizes that an edit made wrong: code that divides a width by a number of heads
    needs both changed.
    """
    inside = f"{edit.module}." if edit.module else ""
    new = [note for note in after if note not in before and f"{note.module}.".startswith(inside)]
    here = refused.alone(edit)
    for _ in range(_PAIRS):
        trial = [
            found
            for found in propose(small, new, here)
            if (found.module, found.kind) == (edit.module, "attribute")
        ]
        if not trial:
            return None
        made = _make(small, trial, here)
        try:
            found = look()
            if not _worse(before, found.notes, [edit, *made]):
                return [edit, *made], found
        except MendError:  # it leads the code astray
            pass
        undo_edits(small, made)
        here.add(*map(key, made))
    return None


def _make(small: nn.Module, trial: list[Edit], refused: Refused) -> list[Edit]:
    """Make the edits that can be made, and tell which they are."""
    return [edit for edit in trial if _applied(small, edit, refused)]


def _applied(small: nn.Module, edit: Edit, refused: Refused) -> bool:
    """Make the edit; False if its place (shared with other modules, say) has changed meanwhile."""
    try:
        apply_edit(small, edit)
    except MendError:
        refused.add(key(edit))
        return False
    return True


def _worse(before: list[Note], after: list[Note], trial: list[Edit]) -> list[Edit]:
    """Edits after which the modules below them have no fewer notes; all notes count for parts that had none
    of their own.

    All of them if the code stops now that ran to its end before, or stops earlier: it was noted less far. If
    it goes on now where it stopped before, what is noted after that place does not count.
    """
    end = reached(before)
    if reached(after) < end:
        return trial
    after = [note for note in after if note.call <= end]

    def scope(edit: Edit) -> str:
        return edit.module if _below(before, edit.module) else ""

    return [edit for edit in trial if _below(after, scope(edit)) >= _below(before, scope(edit))]


def reached(notes: list[Note]) -> int:
    """The op that the code came to before it stopped."""
    return min((note.reached for note in notes), default=sys.maxsize)


def _below(notes: list[Note], path: str) -> int:
    return sum(n.module == path or n.module.startswith(f"{path}.") or not path for n in notes)
