"""find_edits(small, runs, shapes, choice) -> Mended: which numbers in the model's code must change with the
new widths.

Evidence, not names: the small model is run once under a mode that compares each op with the recorded run. A
number that should have changed and did not is noted with the module that ran it, and the right one is put in
its place so that the run goes on to the end. What explains the notes is changed (see `suggest`); another run
shows whether that was right.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from surgeon.capture.aligned_run import repeated
from surgeon.coupling.groups import outputs_of_tensors
from surgeon.errors import MendError
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph, spec
from surgeon.mend.apply_edits import apply_edit, undo_edits
from surgeon.mend.candidates import propose
from surgeon.mend.checking.constants import Constant, Judge, to_blame
from surgeon.mend.checking.expected_sizes import wanted
from surgeon.mend.checking.notes import COMPARISONS, Note, of_ones
from surgeon.mend.checking.size_check import Findings, check, compare
from surgeon.mend.edits import Edit
from surgeon.mend.kept_numbers import kept_numbers
from surgeon.mend.refused import Refused
from surgeon.mend.ties import ties
from surgeon.mend.trials import reached, try_edits
from surgeon.ops.table import is_view, op_name
from surgeon.selection.cost import Choice, ShapeModel

_ROUNDS = 256  # a run may end at the first block whose sizes do not fit, so deep models need many


@dataclasses.dataclass(frozen=True)
class Mended:
    """What was changed in a small model's code.

    Attributes:
        edits: sizes.
        rescaled: other numbers that changed with them, because they count the terms of a sum that lost some
            (1/sqrt(head_dim)).
        unread: numbers that say widths and that no run reads.
        undecided: those that keep their value because nothing tells what they say, as text.
    """

    edits: tuple[Edit, ...]
    rescaled: tuple[Constant, ...] = ()
    unread: tuple[Edit, ...] = ()
    undecided: tuple[str, ...] = ()


Unread = Callable[[], tuple[Sequence[Edit], Sequence[str]]]


def find_edits(
    small: nn.Module,
    runs: Sequence[Graph],
    shapes: ShapeModel,
    choice: Choice,
    unread: Unread = lambda: ((), ()),
) -> Mended:
    """Find the edits and make them in `small`, which is the copy that `shrink_module` gave.

    Of edits that explain the sizes those are made that change no other number: an attribute that is a scale
    as well stays what it is, and the number is put in its place where it is a size.

    Args:
        runs: the recorded runs of the original: in eval mode, and in training mode where that runs other
            layers.
        unread: gives the edits of numbers that say widths and that no run reads, and what is undecided, once all
            others are made. A run that does notice them has them undone.

    Raises:
        MendError: the model's code holds a size that neither an attribute nor a literal explains, or another
            number in it would change with a size.
    """
    first = list(_layer_edits(small, runs, shapes, choice))
    for edit in first:
        apply_edit(small, edit)

    def look() -> Findings:
        return check(small, runs, shapes, choice)

    quiet, undecided = _with_unread(small, unread, look)
    if quiet is not None:  # nothing else is to be mended
        return Mended(tuple(first), (), quiet, undecided)
    judge = Judge(runs, shapes, choice)
    edits, refused, found = list[Edit](), Refused(), look()
    wrong_at_first = found.notes
    for _ in range(_ROUNDS):
        wrong = [] if found.notes else [c for c in found.constants if not judge.counts(c)]
        blamed = to_blame(small, edits, wrong, lambda: _reaching_the_end(look())) if wrong else []
        if blamed:
            undo_edits(small, blamed)
            refused.bar(blamed, wrong)
            edits, found = [edit for edit in edits if edit not in blamed], look()
        if not found.notes:
            held = kept_numbers(small, judge.stray(found.constants), look)
            if held:
                edits, found = [*edits, *held], look()
            quiet, undecided = _with_unread(small, unread, look, found)
            return Mended((*first, *edits), judge.following(found.constants), quiet or (), undecided)
        trial = propose(small, found.notes, refused)
        if not trial:
            break
        before = reached(found.notes)
        kept, found = try_edits(small, trial, found, refused, look)
        edits += kept
        # What showed nothing, because the code stopped before it, may help now.
        refused.forget(None if reached(found.notes) > before else {edit.module for edit in kept})
    try:
        _refuse(found.notes, refused, small, runs, shapes, choice)
    except MendError as error:
        error.ties = ties(wrong_at_first, found.notes, runs, shapes)
        raise
    quiet, undecided = _with_unread(small, unread, look, found)
    return Mended((*first, *edits), (), quiet or (), undecided)


def _with_unread(
    small: nn.Module, unread: Unread, look: Callable[[], Findings], wanted: Findings | None = None
) -> tuple[tuple[Edit, ...] | None, tuple[str, ...]]:
    """Make the edits of numbers that no run reads. If a run shows something else than is wanted they are undone:
    None, and they are undecided.

    Args:
        wanted: what runs show without them; None: nothing, which is looked at as well.
    """
    edits, undecided = unread()
    if wanted is not None and not edits:
        return (), tuple(undecided)
    for edit in edits:
        apply_edit(small, edit)
    try:
        same = look() == (wanted or Findings([], []))
    except MendError:
        same = False
    if same:
        return tuple(edits), tuple(undecided)
    undo_edits(small, edits)
    return None, (
        *undecided,
        *(f"{edit.module}.{edit.name} = {edit.old}".removeprefix(".") for edit in edits),
    )


def _reaching_the_end(found: Findings) -> list[Constant] | None:
    """The changed constants of a run that came to its end."""
    return None if reached(found.notes) < sys.maxsize else found.constants


def _refuse(
    notes: list[Note],
    refused: Refused,
    small: nn.Module,
    runs: Sequence[Graph],
    shapes: ShapeModel,
    choice: Choice,
) -> None:
    """Raise what says which sizes are left; not if they are comparisons that change nothing.

    Raises:
        MendError: see there.
    """
    where = "; ".join(str(n) for n in notes[:3])
    if all(note.op in COMPARISONS for note in notes):  # perhaps the code does the same whatever it finds
        try:
            notes = compare(small, runs, shapes, choice, comparisons=False)
        except MendError as error:
            raise MendError(
                error.what, where=f"{where}; {error.where}", why=error.why, fix=error.fix
            ) from error
    if not notes:
        return
    raise MendError(
        f"the model's code holds {len(notes)} sizes that could not be changed",
        where=where,
        why=refused.why()
        or "no integer attribute of the module and no number in its methods or its traced forward explains them"
        + (f"; the code stopped with {notes[-1].stopped}" if notes[-1].stopped else ""),
        fix="compute the size from the tensor's shape in the model's forward, or keep "
        f"the layers that give these channels, ignore={_layers(notes, runs, shapes, choice) or '[...]'}"
        + of_ones(
            (call for graph in runs for call in repeated(graph)[: notes[-1].reached + 1]), shapes, choice
        ),
    )


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
        for dim_ids in (axes[0] if isinstance(axes, tuple) else axes).values():
            for atoms in shapes.solution.atoms(dim_ids.ravel()):
                gone[atoms[atoms >= 0]] = True
    gone &= choice
    found = []
    for name, atoms in outputs_of_tensors(shapes.propagation, shapes.solution).items():
        if gone[atoms].any():
            found.append(name.rpartition(".")[0] or name)
            gone[atoms] = False
    return list(dict.fromkeys(found))


# argument of the op that a layer runs, attribute of the layer
_LAYER_NUMBERS: Mapping[type, tuple[str, str]] = {
    nn.modules.conv._ConvNd: ("groups", "groups"),
    nn.GroupNorm: ("group", "num_groups"),
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
            if is_view(call.node) and len(old_shape) == 3 and 1 in shapes.propagation.axes[call.node]:
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
        given = arguments(call.node)
        for kind, (argument, name) in _LAYER_NUMBERS.items():
            if isinstance(module, kind) and argument in given:
                done.add(call.module)
                old, new = getattr(module, name), wanted(call.node, shapes, choice)[given.places[argument]]
                if old != new:
                    yield Edit(call.module, "attribute", name, old, new)
