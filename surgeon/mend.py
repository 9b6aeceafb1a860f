"""find_edits(small, runs, shapes, choice) -> edits: which numbers in the model's code must change with the new widths.

Evidence, not names: the small model is run once under a mode that compares each op with the recorded run. A number that should
have changed and did not is noted with the module that ran it, and the right one is put in its place so that the run goes on to
the end. Then, for each module, an integer attribute that explains all of its notes is changed, or else a number in its traced
forward; another run shows whether that was right.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon._alike import ALIKE
from surgeon.compare import COMPARISONS, Note, compare
from surgeon.cost import Choice, Shapes
from surgeon.edits import Edit, apply_edit
from surgeon.errors import MendError
from surgeon.forwards import foreign, literals, trace_one
from surgeon.graph import Graph, Spec, named_tensors, spec
from surgeon.rules.registry import op_name
from surgeon.wanted import wanted

_TRIALS = 8  # of attributes that may have to change together
_PAIRS = 4  # second attributes that are tried with a first one
_END = sys.maxsize
_ROUNDS = 64  # a run may end at the first block whose sizes do not fit, so deep models need many


def find_edits(small: nn.Module, runs: Sequence[Graph], shapes: Shapes, choice: Choice) -> tuple[Edit, ...]:
    """Find the edits and make them in `small`, which is the copy that `shrink_module` gave.

    Args:
        runs: the recorded runs of the original: in eval mode, and in training mode where that runs other layers.

    Raises:
        MendError: the model's code holds a size that neither an attribute nor a literal explains.
    """
    edits = list(_layer_edits(small, runs, shapes, choice))
    for edit in edits:
        apply_edit(small, edit)
    if not any(_may_differ(small, graph, shapes, choice) for graph in runs):
        return tuple(edits)
    notes = compare(small, runs, shapes, choice)
    refused: set[tuple[str, str, str]] = set()
    for _ in range(_ROUNDS):
        if not notes:
            return tuple(edits)
        trial = _propose(small, notes, refused)
        if not trial:
            break
        kept, notes = _tried(small, trial, notes, refused, lambda: compare(small, runs, shapes, choice))
        edits += kept
    where = "; ".join(str(n) for n in notes[:3])
    if notes and all(note.op in COMPARISONS for note in notes):  # perhaps the code does the same whatever it finds
        try:
            notes = compare(small, runs, shapes, choice, comparisons=False)
        except MendError as error:
            raise MendError(error.what, where=f"{where}; {error.where}", why=error.why, fix=error.fix) from error
    if notes:
        raise MendError(
            f"the model's code holds {len(notes)} sizes that could not be changed",
            where=where,
            why="no integer attribute of the module and no literal in its traced forward explains them"
            + (f"; the code stopped with {notes[-1].stopped}" if notes[-1].stopped else ""),
            fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
        )
    return tuple(edits)


def _tried(
    small: nn.Module, trial: list[Edit], notes: list[Note], refused: set[tuple[str, str, str]], look: Callable[[], list[Note]]
) -> tuple[list[Edit], list[Note]]:
    """Make the edits of a trial that help, and tell what is left to change; the others are undone and refused."""
    made, undo = _make(small, trial, refused)
    after: list[Note] = []
    try:
        after = look()
        worse = _worse(notes, after, made)
    except MendError:  # one of them leads the code astray
        worse = made
    if worse and len(made) == 1:
        together = _with_others(small, made[0], notes, after, look)
        if together is not None:
            return together
    undo(worse)
    if len(worse) == len(made) > 1:  # find out which
        kept: list[Edit] = []
        for edit in made:
            found, notes = _tried(small, [edit], notes, refused, look)
            kept += found
        return kept, notes
    refused |= {(edit.module, edit.kind, edit.name) for edit in worse}
    return [edit for edit in made if edit not in worse], look() if worse else after


def _with_others(
    small: nn.Module, edit: Edit, before: list[Note], after: list[Note], look: Callable[[], list[Note]]
) -> tuple[list[Edit], list[Note]] | None:
    """Change numbers for the sizes that an edit made wrong: code that divides a width by a number of heads needs both changed."""
    inside = f"{edit.module}." if edit.module else ""
    new = [note for note in after if note not in before and f"{note.module}.".startswith(inside)]
    refused = {(edit.module, edit.kind, edit.name)}  # what was refused alone may be right together
    for _ in range(_PAIRS):
        trial = [found for found in _propose(small, new, refused) if (found.module, found.kind) == (edit.module, "attribute")]
        if not trial:
            return None
        made, undo = _make(small, trial, refused)
        try:
            notes = look()
            if not _worse(before, notes, [edit, *made]):
                return [edit, *made], notes
        except MendError:  # it leads the code astray
            pass
        undo(made)
        refused |= {(found.module, found.kind, found.name) for found in made}
    return None


def _make(
    small: nn.Module, trial: list[Edit], refused: set[tuple[str, str, str]]
) -> tuple[list[Edit], Callable[[list[Edit]], None]]:
    """Make the edits that can be made; which they are, and what undoes some of them."""
    before = {edit: type(small.get_submodule(edit.module)) for edit in trial}
    made = [edit for edit in trial if _applied(small, edit, refused)]

    def undo(edits: list[Edit]) -> None:
        for edit in reversed(edits):
            if edit.kind == "literal":  # it changed the module's class
                small.get_submodule(edit.module).__class__ = before[edit]
            else:
                apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))

    return made, undo


def _applied(small: nn.Module, edit: Edit, refused: set[tuple[str, str, str]]) -> bool:
    """Make the edit; False if its place (shared with other modules, say) has changed meanwhile."""
    try:
        apply_edit(small, edit)
    except MendError:
        refused.add((edit.module, edit.kind, edit.name))
        return False
    return True


def _may_differ(small: nn.Module, graph: Graph, shapes: Shapes, choice: Choice) -> bool:
    """Whether the model's own code gives a size that must change, or decides on sizes; else a run could find nothing."""
    for node in graph.fx.nodes:
        if "decided" in node.meta and isinstance(node.meta["spec"], Spec):
            small_shape = shapes.shape(node, choice)
            if any(small_shape[dim] != node.meta["spec"].shape[dim] for dim in node.meta["decided"]):
                return True
    for call in graph.calls:
        for position, new in wanted(call.node, shapes, choice).items():
            old: Any = call.node.args[position]
            changed = [a != b and a != -1 for a, b in zip(old, new, strict=True)] if isinstance(new, list) else [old != new]
            if any(changed) and not call.node.meta.get("derived") and not _own_layer(small.get_submodule(call.module), call.node):
                return True
    return _keeps_old_sizes(small, graph)


def _keeps_old_sizes(small: nn.Module, graph: Graph) -> bool:
    """Whether a module of the user's holds a number that was a size of its own tensors: its code may pass it to a function."""
    for name, tensor in named_tensors(small):
        path, _, _ = name.rpartition(".")
        module = small.get_submodule(path)
        old = graph.tensors[name].shape if name in graph.owned else tensor.shape
        if tensor.shape == old or type(module).forward.__module__.startswith("torch.nn."):
            continue
        gone = {a for a, b in zip(old, tensor.shape, strict=True) if a != b}
        if any(value in gone for _, value in integers(module)):
            return True
    return False


def _own_layer(module: nn.Module, node: fx.Node) -> bool:
    """Whether one of torch's own layers passes this size, from a number that is set beside its tensors."""
    kinds = tuple(kind for kind, op in _LAYER_NUMBERS if op == op_name(node))
    if op_name(node) == "native_layer_norm":
        kinds = (nn.LayerNorm,)
    elif op_name(node) == "view":  # from the shapes of its inputs and the number of heads
        kinds = (nn.MultiheadAttention,)
    return isinstance(module, kinds) and type(module).forward.__module__.startswith("torch.nn.")


_LAYER_NUMBERS: Mapping[tuple[type, str], tuple[int, str]] = {
    (nn.modules.conv._ConvNd, "convolution"): (8, "groups"),
    (nn.GroupNorm, "native_group_norm"): (6, "num_groups"),
}


def _layer_edits(small: nn.Module, runs: Sequence[Graph], shapes: Shapes, choice: Choice) -> Iterator[Edit]:
    """Numbers of torch's own layers that their tensors do not show: groups of convolutions and norms, heads of attention."""
    done = set()
    for call in (call for graph in runs for call in graph.calls):
        if call.module in done:
            continue
        module = small.get_submodule(call.module)
        if isinstance(module, nn.MultiheadAttention):  # views q as [length, batch * heads, head_dim]
            old_shape, new_shape = spec(call.node).shape, shapes.shape(call.node, choice)
            if op_name(call.node) == "view" and len(old_shape) == 3 and 1 in shapes.propagation.axes[call.node]:
                done.add(call.module)
                heads = module.num_heads * new_shape[1] // old_shape[1]
                if heads != module.num_heads:
                    yield Edit(call.module, "attribute", "num_heads", module.num_heads, heads)
            continue
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is None:  # no tensor shows what it normalises
            done.add(call.module)
            last = len(module.normalized_shape)
            for place, new in enumerate(shapes.shape(call.node, choice)[-last:]):
                if new != module.normalized_shape[place]:
                    yield Edit(call.module, "attribute", f"normalized_shape.{place}", module.normalized_shape[place], new)
            continue
        for (kind, op), (position, name) in _LAYER_NUMBERS.items():
            if isinstance(module, kind) and op_name(call.node) == op:
                done.add(call.module)
                old, new = getattr(module, name), wanted(call.node, shapes, choice)[position]
                if old != new:
                    yield Edit(call.module, "attribute", name, old, new)


# -- what to change -------------------------------------------------------------------------------------------------


def _propose(small: nn.Module, notes: list[Note], refused: set[tuple[str, str, str]]) -> list[Edit]:
    """For each module with notes an attribute of it or of one that holds it, else several, else a literal of its forward."""
    by_module: dict[str, list[Note]] = defaultdict(list)
    for note in notes:
        by_module[note.module].append(note)
    edits: dict[tuple[str, str, str], Edit] = {}
    for path, own in by_module.items():
        one = _attribute(small, path, own, refused)
        if one is None:
            several = _together(small, path, own, refused)
            one = None if several else _literal(small, path, own, refused)
        for found in several if one is None else [one]:
            edits.setdefault((found.module, found.kind, found.name), found)
    return list(edits.values())


def _attribute(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> Edit | None:
    """An attribute of the module or of one that holds it: the one that explains most notes, exact matches first.

    Of those that are divided somewhere, those that become a width of the module's parameters come first.
    """
    widths = {size for tensor in small.get_submodule(path).parameters() for size in tensor.shape}
    for owner in _owners(path):
        best: tuple[tuple[bool, bool, int, int], Edit] | None = None
        for name, value in integers(small.get_submodule(owner)):
            if (owner, "attribute", name) in refused or value <= 0:
                continue
            for note in notes:
                found = _solved(note, value)
                if found is None or found[0] == value:
                    continue
                new, times = found
                fits = sum(_explains(n, value, new) for n in notes)
                rank = (note.got >= value, note.got < value and new in widths, fits, -times)
                if best is None or rank > best[0]:
                    best = (rank, Edit(owner, "attribute", name, value, new))
        if best is not None:
            return best[1]
    return _below_it(small, path, notes, refused)


def _solved(note: Note, value: int) -> tuple[int, int] | None:
    """(what a number must become, how many times) where the code passes a multiple of it, or a fraction (width // heads)."""
    times, rest = divmod(note.got, value)
    if times and not rest and note.old % value == 0:
        return None if note.want % times else (note.want // times, times)
    times, rest = divmod(value, note.got) if note.got > 0 else (0, 1)
    return (note.want * times, times) if times and not rest else None


def _owners(path: str) -> list[str]:
    """A module and those that hold it, the model last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _together(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> list[Edit]:
    """Attributes that hold the old numbers, all changed at once: where each alone was refused, code may compute with several."""
    changes = sorted({(note.got, note.want) for note in notes})
    if len(changes) < 2:
        return []
    held = [(owner, name, value) for owner in _owners(path) for name, value in integers(small.get_submodule(owner))]
    candidates = [
        [Edit(owner, "attribute", name, got, want) for owner, name, value in held if value == got] for got, want in changes
    ]
    for edits in itertools.islice(itertools.product(*candidates), _TRIALS):
        key = (path, "attributes", " ".join(f"{edit.module}.{edit.name}" for edit in edits))
        if key not in refused:
            refused.add(key)  # tried once
            return list(edits)
    return []


def _below_it(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> Edit | None:
    """An attribute of a module inside this one that holds the very number, if this one's code names it."""
    outer = small.get_submodule(path)
    methods = [f for kind in type(outer).__mro__ for f in vars(kind).values() if isinstance(f, types.FunctionType)]
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


def _literal(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> Edit | None:
    """A number in the module's own traced forward that is the old size."""
    try:
        traced = trace_one(small.get_submodule(path))
    except Exception:  # noqa: BLE001  # torch.fx raises anything that the traced code raises; no trace means no literal
        return None
    others = foreign(traced)
    for note in notes:
        found = [
            name
            for name, value in literals(traced)
            if value == note.got
            and (path, "literal", name) not in refused
            and (name.partition(":")[0] in others or _same_call(name, note.op))
        ]
        if found:  # the number at the same place of a list, else the first that fits
            name = min(found, key=lambda n: {str(note.place): 0, str(note.place + 1): 1}.get(n.rpartition(".")[2], 2))
            return Edit(path, "literal", name, note.got, note.want)
    return None


_CALLS = {
    "view": ("view", "reshape", "unflatten", "flatten"),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "constant_pad_nd": ("pad", "_pad"),
    "slice": ("getitem", "narrow"),
    "split": ("split", "chunk"),
    "split_with_sizes": ("split",),
}


def _same_call(name: str, op: str) -> bool:
    called = name.split(":")[0]
    return called in _CALLS.get(ALIKE.get(op, op), (op, op.removeprefix("native_"), op.removeprefix("new_")))


def integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every whole number that a module keeps: attributes, numbers in its tuples and lists, and in plain objects it holds."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training":
            yield from _integers(name, value, depth=2)


def _integers(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool | Tensor | nn.Module | types.FunctionType | type | torch.Size):
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
            if isinstance(key, str) and "." not in key:
                yield from _integers(f"{path}.{key}", item, depth - 1)
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            yield from _integers(f"{path}.{key}", item, depth - 1)


def _worse(before: list[Note], after: list[Note], trial: list[Edit]) -> list[Edit]:
    """Edits after which the modules below them have no fewer notes; all notes count for parts that had none of their own.

    All of them if the code stops now that ran to its end before, or stops earlier: it was noted less far.
    """
    reached = [max((note.call for note in notes if note.stopped), default=_END) for notes in (before, after)]
    if reached[1] < reached[0]:
        return trial

    def scope(edit: Edit) -> str:
        return edit.module if _below(before, edit.module) else ""

    return [edit for edit in trial if _below(after, scope(edit)) >= _below(before, scope(edit))]


def _below(notes: list[Note], path: str) -> int:
    return sum(n.module == path or n.module.startswith(f"{path}.") or not path for n in notes)
