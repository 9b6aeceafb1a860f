"""propose(small, notes, refused) -> edits: which numbers may explain the sizes that a small model's code got
wrong.

For each module with notes an integer attribute of it, or of one that holds it, that explains most of them;
else several attributes at once, because code computes with them; else a number in the source of its methods,
or in its traced forward, or the name of one at one place. Whether that was right shows when the model is run.
"""

from __future__ import annotations

import itertools
import math
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from surgeon.graph.source_code import Use, methods_as_written, numbers, own_classes, uses
from surgeon.mend.attribute_path import OF_TORCH
from surgeon.mend.checking.notes import COMPARISONS, Note
from surgeon.mend.edits import Edit, edits_of
from surgeon.mend.refused import Refused
from surgeon.mend.traced_forward import foreign, literals, versions
from surgeon.ops.table import alike

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
        or _source(small, path, notes, refused, near=0)
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
        one = _in_code(small, path, notes, refused)
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
        best: tuple[tuple[bool, bool, int, int], Edit] | None = None
        for name, value in integers(small.get_submodule(owner)):
            if (owner, "attribute", name) in refused or value <= 0:
                continue
            for note in notes:
                found = None if exact and value != note.got else _solved(note, value)
                if found is None or found[0] == value:
                    continue
                new, times = found
                fits = sum(_explains(n, value, new) for n in notes)
                rank = (note.got >= value, note.got < value and new in widths, fits, -times)
                if best is None or rank > best[0]:
                    best = (rank, Edit(owner, "attribute", name, value, new))
        if best is not None:
            return best[1]
    return None


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


def _solved(note: Note, value: int) -> tuple[int, int] | None:
    """(what a number must become, how many times) where the code passes a multiple of it, or a fraction
    (width // heads).
    """
    if note.want == 0 and note.got not in (0, value):  # of anything, none
        return None
    times, rest = divmod(note.got, value)
    if times and not rest and note.old % value == 0:
        return None if note.want % times else (note.want // times, times)
    times, rest = divmod(value, note.got) if note.got > 0 else (0, 1)
    return (note.want * times, times) if times and not rest else None


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


def _in_code(small: nn.Module, path: str, notes: list[Note], refused: Refused) -> Edit | None:
    """A number in the source of the module's methods that is the old size, or one use of its name, else one in
    its traced forward.
    """
    one = _source(small, path, notes, refused) or _use(small, path, notes, refused)
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
        solved = _solved(note, value) if value > 0 and name.partition(":")[0] in _COMPUTES else None
        if solved is not None and solved[0] != value:
            return Edit(path, "literal", name, value, solved[0])
    return None


def _source(
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
        solved = _solved(note, value) if value > 0 and (file, line) == note.source else None
        if solved is not None and solved[0] != value:
            return Edit(path, "source", name, value, solved[0])
    return None


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
    solved = _solved(note, use.value) if use.value > 0 else None
    if solved is None or solved[0] == use.value:
        return None
    return 3 * away + 2, solved[0]


_FAR = 1 << 30
_COMPUTES = ("mul", "floordiv")
_CALLS = {
    "view": ("view", "reshape", "unflatten", "flatten"),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "constant_pad_nd": ("pad", "_pad"),
    "slice": ("getitem", "setitem", "narrow"),
    "split": ("split", "chunk"),
}


def _same_call(name: str, op: str) -> bool:
    called = name.split(":")[0]
    plain = op.removeprefix("native_"), op.removeprefix("new_"), op.removesuffix("_with_sizes")
    return called in _CALLS.get(alike(op), (op, *plain))


def integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every whole number that a module keeps: attributes, numbers in its tuples and lists, and in plain
    objects it holds.

    Those of its class as well: set on the module, they hide the class's.
    """
    held = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
    for kind in own_classes(module):
        for name, value in vars(kind).items():
            several = type(value) is tuple and all(type(item) is int for item in value)
            if (type(value) is int or several) and not name.startswith("_"):
                held.setdefault(name, value)
    for name, value in held.items():
        if not name.startswith("__"):
            yield from _integers(name, value, depth=2)


def _integers(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool | Tensor | nn.Module | types.FunctionType | types.ModuleType | type):
        return
    if isinstance(value, int):
        yield path, value
    elif depth == 0:
        return
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _integers(f"{path}.{i}", item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str) and "." not in key and not key.startswith("__"):
                yield from _integers(f"{path}.{key}", item, depth - 1)
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            if not key.startswith("__"):
                yield from _integers(f"{path}.{key}", item, depth - 1)
