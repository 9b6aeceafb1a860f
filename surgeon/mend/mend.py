"""find_edits(small, runs, shapes, choice) -> edits: which numbers in the model's code must change with the
new widths.

Evidence, not names: the small model is run once under a mode that compares each op with the recorded run. A
number that should have changed and did not is noted with the module that ran it, and the right one is put in
its place so that the run goes on to the end. What explains the notes is changed (see `suggest`); another run
shows whether that was right.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from surgeon.capture.aligned_run import repeated
from surgeon.coupling.groups import outputs_of_tensors
from surgeon.errors import MendError
from surgeon.graph.graph import Graph, Spec, spec
from surgeon.graph.tensors import named_tensors
from surgeon.mend.candidates import integers, propose
from surgeon.mend.edits import Edit, apply_edit
from surgeon.mend.expected_sizes import wanted
from surgeon.mend.size_check import COMPARISONS, Note, compare, of_ones
from surgeon.ops.table import op_name
from surgeon.selection.cost import Choice, ShapeModel

_PAIRS = 4  # second attributes that are tried with a first one
_ROUNDS = 64  # a run may end at the first block whose sizes do not fit, so deep models need many


def find_edits(
    small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice
) -> tuple[Edit, ...]:
    """Find the edits and make them in `small`, which is the copy that `shrink_module` gave.

    Args:
        runs: the recorded runs of the original: in eval mode, and in training mode where that runs other
            layers.

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
        trial = propose(small, notes, refused)
        if not trial:
            break
        before = _reached(notes)
        kept, notes = _tried(small, trial, notes, refused, lambda: compare(small, runs, shapes, choice))
        edits += kept
        if _reached(notes) > before:  # what showed nothing, because the code stopped before it, may help now
            refused.clear()
    where = "; ".join(str(n) for n in notes[:3])
    if notes and all(
        note.op in COMPARISONS for note in notes
    ):  # perhaps the code does the same whatever it finds
        try:
            notes = compare(small, runs, shapes, choice, comparisons=False)
        except MendError as error:
            raise MendError(
                error.what, where=f"{where}; {error.where}", why=error.why, fix=error.fix
            ) from error
    if notes:
        raise MendError(
            f"the model's code holds {len(notes)} sizes that could not be changed",
            where=where,
            why="no integer attribute of the module and no number in its methods or its traced forward explains them"
            + (f"; the code stopped with {notes[-1].stopped}" if notes[-1].stopped else ""),
            fix="compute the size from the tensor's shape in the model's forward, or keep "
            f"the layers that give these channels, ignore={_layers(notes, runs, shapes, choice) or '[...]'}"
            + of_ones(
                (call for graph in runs for call in repeated(graph)[: notes[-1].reached + 1]), shapes, choice
            ),
        )
    return tuple(edits)


def _tried(
    small: nn.Module,
    trial: list[Edit],
    notes: list[Note],
    refused: set[tuple[str, str, str]],
    look: Callable[[], list[Note]],
) -> tuple[list[Edit], list[Note]]:
    """Make the edits of a trial that help, and tell what is left to change; the others are undone and
    refused.
    """
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
    if len(worse) == len(made) > 1:
        return _apart(small, made, notes, refused, look)
    refused |= {(edit.module, edit.kind, edit.name) for edit in worse}
    return [edit for edit in made if edit not in worse], look() if worse else after


def _apart(
    small: nn.Module,
    edits: list[Edit],
    notes: list[Note],
    refused: set[tuple[str, str, str]],
    look: Callable[[], list[Note]],
) -> tuple[list[Edit], list[Note]]:
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
        found, notes = _tried(small, [first], notes, refused, look)
        if not found and len(rest) > 1:
            found, notes = _tried(small, [rest.pop()], notes, refused, look)
            if not found:
                refused |= {(edit.module, edit.kind, edit.name) for edit in rest}
                rest = []
        kept += found
        if rest:
            found, notes = _tried(small, rest, notes, refused, look)
            kept += found
    return kept, notes


def _with_others(
    small: nn.Module, edit: Edit, before: list[Note], after: list[Note], look: Callable[[], list[Note]]
) -> tuple[list[Edit], list[Note]] | None:
    """Change numbers for the sizes that an edit made wrong: code that divides a width by a number of heads
    needs both changed.
    """
    inside = f"{edit.module}." if edit.module else ""
    new = [note for note in after if note not in before and f"{note.module}.".startswith(inside)]
    refused = {(edit.module, edit.kind, edit.name)}  # what was refused alone may be right together
    for _ in range(_PAIRS):
        trial = [
            found
            for found in propose(small, new, refused)
            if (found.module, found.kind) == (edit.module, "attribute")
        ]
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
            if edit.kind != "attribute":  # it changed the module's class
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


def _layers(notes: Sequence[Note], runs: Sequence[Graph], shapes: ShapeModel, choice: Choice) -> list[str]:
    """The layers whose outputs have the noted sizes; of those that lose the same channels, one."""
    calls = {(note.call, note.module, note.op) for note in notes}
    nodes = {
        call.node
        for graph in runs
        for at, call in enumerate(repeated(graph))
        if (at, call.module, op_name(call.node)) in calls
    }
    gone = np.zeros(len(choice), dtype=bool)
    for node in nodes:
        axes = shapes.propagation.axes.get(node, {})
        for track in (axes[0] if isinstance(axes, tuple) else axes).values():
            for atoms in shapes.solution.atoms(track.ravel()):
                gone[atoms[atoms >= 0]] = True
    gone &= choice
    found = []
    for name, atoms in outputs_of_tensors(shapes.propagation, shapes.solution).items():
        if gone[atoms].any():
            found.append(name.rpartition(".")[0] or name)
            gone[atoms] = False
    return list(dict.fromkeys(found))


def _may_differ(small: nn.Module, graph: Graph, shapes: ShapeModel, choice: Choice) -> bool:
    """Whether the model's own code gives a size that must change, or decides on sizes; else a run could find
    nothing.
    """
    for node in graph.fx.nodes:
        if "decided" in node.meta and isinstance(node.meta["spec"], Spec):
            small_shape = shapes.shape(node, choice)
            if any(small_shape[dim] != node.meta["spec"].shape[dim] for dim in node.meta["decided"]):
                return True
    for call in graph.calls:
        for position, new in wanted(call.node, shapes, choice).items():
            old: Any = call.node.args[position]
            changed = (
                [a != b and a != -1 for a, b in zip(old, new, strict=True)]
                if isinstance(new, list)
                else [old != new]
            )
            if (
                any(changed)
                and not call.node.meta.get("derived")
                and not _own_layer(small.get_submodule(call.module), call.node)
            ):
                return True
    return _keeps_old_sizes(small, graph)


def _keeps_old_sizes(small: nn.Module, graph: Graph) -> bool:
    """Whether a module of the user's holds a number that was a size of its own tensors: its code may pass it
    to a function.
    """
    for name, tensor in named_tensors(small):
        path, _, _ = name.rpartition(".")
        module = small.get_submodule(path)
        old = graph.tensors[name].shape if name in graph.owned else tensor.shape
        if tensor.shape == old or isinstance(
            module, torch.jit.ScriptModule
        ):  # compiled code reads no attribute anew
            continue
        if type(module).forward.__module__.startswith("torch.nn."):
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


def _layer_edits(
    small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice
) -> Iterator[Edit]:
    """Numbers of torch's own layers that their tensors do not show: groups of convolutions and norms, heads
    of attention.
    """
    done = set()
    for call in (call for graph in runs for call in graph.calls):
        if call.module in done:
            continue
        module = small.get_submodule(call.module)
        if isinstance(module, nn.MultiheadAttention):  # views q as [length, batch * heads, head_dim]
            old_shape, new_shape = spec(call.node).shape, shapes.shape(call.node, choice)
            if (
                op_name(call.node) == "view"
                and len(old_shape) == 3
                and 1 in shapes.propagation.axes[call.node]
            ):
                done.add(call.module)
                heads = module.num_heads * new_shape[1] // old_shape[1]
                if heads != module.num_heads:
                    yield Edit(call.module, "attribute", "num_heads", module.num_heads, heads)
            continue
        if (
            isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is None
        ):  # no tensor shows what it normalises
            done.add(call.module)
            last = len(module.normalized_shape)
            for place, new in enumerate(shapes.shape(call.node, choice)[-last:]):
                if new != module.normalized_shape[place]:
                    yield Edit(
                        call.module,
                        "attribute",
                        f"normalized_shape.{place}",
                        module.normalized_shape[place],
                        new,
                    )
            continue
        for (kind, op), (position, name) in _LAYER_NUMBERS.items():
            if isinstance(module, kind) and op_name(call.node) == op:
                done.add(call.module)
                old, new = getattr(module, name), wanted(call.node, shapes, choice)[position]
                if old != new:
                    yield Edit(call.module, "attribute", name, old, new)


def _worse(before: list[Note], after: list[Note], trial: list[Edit]) -> list[Edit]:
    """Edits after which the modules below them have no fewer notes; all notes count for parts that had none
    of their own.

    All of them if the code stops now that ran to its end before, or stops earlier: it was noted less far. If
    it goes on now where it stopped before, what is noted after that place does not count.
    """
    reached = _reached(before)
    if _reached(after) < reached:
        return trial
    after = [note for note in after if note.call <= reached]

    def scope(edit: Edit) -> str:
        return edit.module if _below(before, edit.module) else ""

    return [edit for edit in trial if _below(after, scope(edit)) >= _below(before, scope(edit))]


def _reached(notes: list[Note]) -> int:
    """The op that the code came to before it stopped."""
    return min((note.reached for note in notes), default=sys.maxsize)


def _below(notes: list[Note], path: str) -> int:
    return sum(n.module == path or n.module.startswith(f"{path}.") or not path for n in notes)
