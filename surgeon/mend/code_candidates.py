"""Numbers in a module's code that may explain sizes that it got wrong."""

from __future__ import annotations

import itertools
import linecache
import math
import re

from torch import fx, nn

from surgeon.graph.python_calls import CALLED, COMPUTES_SIZES
from surgeon.graph.source_code import Use, methods_as_written, numbers, uses
from surgeon.mend.checking.notes import COMPARISONS, Note, divisor, must_become
from surgeon.mend.edits import Edit
from surgeon.mend.methods.rewrite import edits_of
from surgeon.mend.methods.traced_forward import foreign, literals, versions
from surgeon.mend.refused import Refused
from surgeon.ops.table import alike


def in_code(small: nn.Module, path: str, notes: list[Note], refused: Refused) -> Edit | None:
    """A number in the source of the module's methods that is the old size, or one use of its name, else one in
    its traced forward.
    """
    one = in_source(small, path, notes, refused) or _use(small, path, notes, refused)
    if one is not None:
        return one
    try:
        found = versions(small.get_submodule(path))
    except Exception:  # noqa: BLE001  # torch.fx raises anything that the traced code raises
        return None
    return _traced(next(iter(found.values())), path, notes, refused)


def _traced(traced: fx.GraphModule, path: str, notes: list[Note], refused: Refused) -> Edit | None:
    others = foreign(traced)
    known = [(name, value) for name, value in literals(traced) if (path, "literal", name) not in refused]
    for note in notes:
        found = [
            name
            for name, value in known
            if value == note.got and (name.partition(":")[0] in others or _same_call(name, note.op))
        ]
        if found:  # the number at the same place of a list, else the first that fits
            name = min(
                found, key=lambda n: {str(note.place): 0, str(note.place + 1): 1}.get(n.rpartition(".")[2], 2)
            )
            return Edit(path, "literal", name, note.got, note.want)
    for note, (name, value) in itertools.product(notes, known):  # the code computes with it
        solved = must_become(note, value) if value > 0 and name.partition(":")[0] in COMPUTES_SIZES else None
        if solved is not None and solved[0] != value:
            return Edit(path, "literal", name, value, solved[0])
    return None


def in_source(
    small: nn.Module, path: str, notes: list[Note], refused: Refused, near: float = math.inf
) -> Edit | None:
    """A number in the source of the module's methods: of those that are the old size the nearest to the line
    that was noted, at most `near` lines away.

    Else one of which the code passes a multiple, on that very line (not with `near` = 0: weaker evidence than
    an attribute is).
    """
    module = small.get_submodule(path)
    changed = {edit.name: edit.new for edit in edits_of(module) if edit.kind == "source"}
    known = [
        (*where, f"{name}:{which}", changed.get(f"{name}:{which}", value))
        for name, method in methods_as_written(module).items()
        for which, where, value in numbers(method)
        if (path, "source", f"{name}:{which}") not in refused
    ]
    notes = [note for note in notes if note.want >= 0]  # numbers in source have no sign
    for note in notes:
        file, at = note.source or ("", 0)
        same = [
            (abs(line - at) if here == file else _FAR, name)
            for here, line, name, value in known
            if value == note.got
        ]
        if same and min(same)[0] <= near:
            return Edit(path, "source", min(same)[1], note.got, note.want)
    for note, (file, line, name, value) in itertools.product(notes, known if near else ()):
        if value <= 0 or (file, line) != note.source:
            continue
        divides = divisor(note, value) if _divides(value, file, line) else None
        solved = (divides, 1) if divides is not None else must_become(note, value)
        if solved is not None and solved[0] != value:
            return Edit(path, "source", name, value, solved[0])
    return None


def _divides(value: int, file: str, line: int) -> bool:
    """Whether a line of code divides by a number."""
    return re.search(rf"/\s*{value}(?![\d.])", linecache.getline(file, line)) is not None


def _use(small: nn.Module, path: str, notes: list[Note], refused: Refused) -> Edit | None:
    """One use of a named number in the module's methods: where the name's number has another meaning as well
    that must stay.

    Those that are the old size on the noted line come first, then local names and numbers of which the code
    passes a multiple there, then others, the nearest first.
    """
    module = small.get_submodule(path)
    changed = {edit.name for edit in edits_of(module) if edit.kind == "use"}
    best: tuple[tuple[int, int], Edit] | None = None
    for name, method in methods_as_written(module).items():
        for use in uses(method, module):
            place = f"{name}:{use.which}:{use.text}"
            hidden = any(part.startswith("__") for part in use.text.split("."))
            if hidden or place in changed or (path, "use", place) in refused:
                continue
            for note in notes:
                found = _replacing(use, note)
                if found is not None and (best is None or (found[0], use.which) < best[0]):
                    edit = Edit(path, "use", place, use.value or note.got, found[1])
                    best = (found[0], use.which), edit
    return None if best is None else best[1]


def _replacing(use: Use, note: Note) -> tuple[int, int] | None:
    """(how weak the evidence is, the number) to put in place of a use; None if it explains nothing."""
    if note.op in COMPARISONS and "." not in use.text:  # a local or a global name may be decided by elsewhere
        return None
    file, line = note.source or ("", 0)
    away = abs(use.line - line) if use.file == file else _FAR
    if use.value == note.got:
        return 3 * away, note.want
    if use.value is None:
        return (1, note.want) if away == 0 else None
    solved = must_become(note, use.value) if use.value > 0 else None
    if solved is not None and solved[0] != use.value:
        return 3 * away + 2, solved[0]
    divides = divisor(note, use.value) if away == 0 else None
    return None if divides is None else (2, divides)


_FAR = 1 << 30


def _same_call(name: str, op: str) -> bool:
    called = name.split(":")[0]
    plain = op.removeprefix("native_"), op.removeprefix("new_"), op.removesuffix("_with_sizes")
    return called in CALLED.get(alike(op), (op, *plain))
