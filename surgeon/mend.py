"""find_edits(small, runs, shapes, choice) -> edits: which numbers in the model's code must change with the new widths.

Evidence, not names: the small model is run once under a mode that compares each op with the recorded run. A number that should
have changed and did not is noted with the module that ran it, and the right one is put in its place so that the run goes on to
the end. Then, for each module, an integer attribute that explains all of its notes is changed, or else a number in its traced
forward; another run shows whether that was right.
"""

from __future__ import annotations

import dataclasses
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon._views import getitem
from surgeon.capture import CallStack, quiet_run
from surgeon.cost import Choice, Shapes
from surgeon.errors import MendError
from surgeon.graph import Call, Graph, source_line
from surgeon.labels import Axes
from surgeon.rewrite import Edit, apply_edit, literals, trace_one
from surgeon.rules.movement import normal_slice
from surgeon.rules.registry import Site, op_name

_ROUNDS = 12
_ALIKE = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view", "unsafe_split": "split"}
_OPTIONAL = {"clone", "alias", "detach", "contiguous"}


@dataclasses.dataclass(frozen=True)
class Note:
    """One number that the small model's code got wrong: the op at `call` has `got` where the cut asks for `want`."""

    call: int
    module: str
    source: tuple[str, int] | None
    op: str
    old: int
    want: int
    got: int

    def __str__(self) -> str:
        line = source_line(self.source)
        return f"{self.op} in module '{self.module}'" + (f" at {line}" if line else "") + f": {self.got} should be {self.want}"


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
    notes = compare(small, runs, shapes, choice)
    refused: set[tuple[str, str, str]] = set()
    for _ in range(_ROUNDS):
        if not notes:
            return tuple(edits)
        trial = _propose(small, notes, refused)
        if not trial:
            break
        for edit in trial:
            apply_edit(small, edit)
        after = compare(small, runs, shapes, choice)
        worse = _worse(notes, after, trial)
        for edit in worse:
            refused.add((edit.module, edit.kind, edit.name))
            if edit.kind == "attribute":
                apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))
        edits += [edit for edit in trial if edit not in worse]
        notes = compare(small, runs, shapes, choice) if worse else after
    if notes:
        raise MendError(
            f"the model's code holds {len(notes)} sizes that could not be changed",
            where="; ".join(str(n) for n in notes[:3]),
            why="no integer attribute of the module and no literal in its traced forward explains them",
            fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
        )
    return tuple(edits)


# -- what the small model should do ---------------------------------------------------------------------------------

Want = Callable[[Shapes, Choice, Site], dict[int, Any]]


def _to_shape(position: int) -> Want:
    return lambda shapes, choice, site: {position: list(shapes.shape(site.node, choice))}


def _want_slice(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    x = site.node.args[0]
    dim, start, stop, step = normal_slice(site, site.shape(x))
    track = site.axes(x).get(dim)
    if track is None:
        return {}
    before = _kept_before(shapes, choice, site.axes(x), dim, start)
    end = _kept_before(shapes, choice, site.axes(x), dim, stop)
    asked_start, asked_end, size = site.arg(2), site.arg(3), site.shape(x)[dim]
    want = {}
    if isinstance(asked_start, int) and asked_start not in (0,):
        want[2] = before if asked_start > 0 else before - shapes.shape(x, choice)[dim]
    if isinstance(asked_end, int) and asked_end < size:
        want[3] = end if asked_end >= 0 else end - shapes.shape(x, choice)[dim]
    return want


def _kept_before(shapes: Shapes, choice: Choice, axes: Axes, dim: int, position: int) -> int:
    """How many entries before `position` stay along `dim`."""
    gone = shapes.leaves(axes[dim], choice)
    head = gone[(slice(None),) * dim + (slice(0, position),)]
    return int((~head).sum(axis=dim).max()) if position else 0


def _want_split(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    dim = int(site.arg(2, "dim", 0)) % len(site.shape(site.node.args[0]))
    sizes = [shapes.shape(site.node, choice, i)[dim] for i in range(len(site.node.meta["spec"]))]
    if op_name(site.node).endswith("with_sizes"):
        return {1: sizes}
    return {1: sizes[0]} if site.shape(site.node.args[0])[dim] != shapes.shape(site.node.args[0], choice)[dim] else {}


def _want_pad(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    pads, ndim = list(site.arg(1)), len(site.out)
    axes = shapes.propagation.axes[site.node]
    old, small = site.out, shapes.shape(site.node, choice)
    for i in range(len(pads) // 2):
        dim = ndim - 1 - i
        if dim in axes:
            if pads[2 * i] > 0:
                pads[2 * i] = _kept_before(shapes, choice, axes, dim, pads[2 * i])
            if pads[2 * i + 1] > 0:
                pads[2 * i + 1] = small[dim] - _kept_before(shapes, choice, axes, dim, old[dim] - pads[2 * i + 1])
    return {1: pads}


def _want_convolution(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    x, weight = (shapes.shape(a, choice) for a in site.node.args[:2])
    out = shapes.shape(site.node, choice)
    return {8: (out[1] if site.arg(6) else x[1]) // weight[1]}


def _want_group_norm(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    x = site.node.args[0]
    small, groups = shapes.shape(x, choice), int(site.arg(6))
    track = site.axes(x).get(1)
    if track is not None:
        gone = shapes.leaves(track, choice)
        first = gone.reshape(gone.shape[0], groups, -1, *gone.shape[2:])
        stays = ~first.all(axis=2)
        groups = int(stays.sum(axis=1).max())
    return {3: small[0], 4: small[1], 6: groups}


def _want_layer_norm(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    count = len(site.arg(1))
    return {1: list(shapes.shape(site.node.args[0], choice)[-count:])}


def _want_repeat(shapes: Shapes, choice: Choice, site: Site) -> dict[int, Any]:
    x = shapes.shape(site.node.args[0], choice)
    out = shapes.shape(site.node, choice)
    x = (1,) * (len(out) - len(x)) + x
    return {1: [new // size if size else 1 for new, size in zip(out, x, strict=True)]}


_WANT: Mapping[str, Want] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "expand"), _to_shape(1)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _to_shape(1)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _to_shape(0)),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _want_split),
    "slice": _want_slice,
    "constant_pad_nd": _want_pad,
    "convolution": _want_convolution,
    "native_group_norm": _want_group_norm,
    "native_layer_norm": _want_layer_norm,
    "repeat": _want_repeat,
}


def wanted(node: fx.Node, shapes: Shapes, choice: Choice) -> dict[int, Any]:
    """The sizes among an op's arguments, by position, as the small model must pass them."""
    rule = _WANT.get(op_name(node)) if node.op == "call_function" else None
    return {} if rule is None else rule(shapes, choice, Site(node, dict(shapes.propagation.axes), shapes.propagation.ledger))


_LAYER_NUMBERS: Mapping[tuple[type, str], tuple[int, str]] = {
    (nn.modules.conv._ConvNd, "convolution"): (8, "groups"),
    (nn.GroupNorm, "native_group_norm"): (6, "num_groups"),
}


def _layer_edits(small: nn.Module, runs: Sequence[Graph], shapes: Shapes, choice: Choice) -> Iterator[Edit]:
    """Numbers of torch's own layers that their tensors do not show: groups of convolutions and group norms."""
    done = set()
    for call in (call for graph in runs for call in graph.calls):
        if call.module in done:
            continue
        module = small.get_submodule(call.module)
        for (kind, op), (position, name) in _LAYER_NUMBERS.items():
            if isinstance(module, kind) and op_name(call.node) == op:
                done.add(call.module)
                old, new = getattr(module, name), wanted(call.node, shapes, choice)[position]
                if old != new:
                    yield Edit(call.module, "attribute", name, old, new)


# -- the comparing run ----------------------------------------------------------------------------------------------


def compare(small: nn.Module, runs: Sequence[Graph], shapes: Shapes, choice: Choice) -> list[Note]:
    """Run the small model as the original was run and note every size that differs from what the cut asks for.

    Raises:
        MendError: the small model takes another path through its code, or an op gives a shape that was not predicted.
    """
    return [note for graph in runs for note in _compare_one(small, graph, shapes, choice)]


def _compare_one(small: nn.Module, graph: Graph, shapes: Shapes, choice: Choice) -> list[Note]:
    mode = _Comparer(small, graph, shapes, choice)
    with quiet_run(small, seed=0, training=graph.training), mode.stack:
        try:
            with mode:
                small(*graph.args, **graph.kwargs)
        except MendError:
            raise
        except Exception as error:
            if mode.notes:
                return mode.notes
            raise MendError(
                f"the small model does not run: {type(error).__name__}: {error}",
                where=mode.place(),
                why="its code uses a size that surgeon did not see",
                fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
            ) from error
    return mode.notes


class _Comparer(TorchDispatchMode):
    def __init__(self, small: nn.Module, graph: Graph, shapes: Shapes, choice: Choice) -> None:
        super().__init__()
        self.calls = [c for c in graph.calls if op_name(c.node) not in _OPTIONAL]
        self.shapes, self.choice = shapes, choice
        self.stack = CallStack(small)
        self.notes: list[Note] = []
        self.at = 0

    def place(self) -> str:
        call = self.calls[min(self.at, len(self.calls) - 1)]
        return f"module '{self.stack.current}', op {self.at}: {op_name(call.node)} {source_line(call.source)}".rstrip()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.rstrip("_") in _OPTIONAL or name == "as_strided_":
            return func(*args, **kwargs)
        call = self._match(func, name)
        args = self._corrected(call, list(args))
        out = func(*args, **kwargs)
        self._check(call, out)
        self.at += 1
        return out

    def _match(self, func: Any, name: str) -> Call:
        if self.at < len(self.calls):
            call = self.calls[self.at]
            if call.op is func or _alike(call.op) == _ALIKE.get(name, name):
                return call
        raise MendError(
            "the small model takes another path through its code than the original",
            where=self.place(),
            why=f"it ran {name} here; a decision in the code depends on a size that changed",
            fix="keep the layer with ignore=[...], or make the decision in __init__",
        )

    def _corrected(self, call: Call, args: list[Any]) -> list[Any]:
        want = wanted(call.node, self.shapes, self.choice)
        for position, value in want.items():
            if position >= len(args):
                continue
            old = call.node.args[position]
            got, new = args[position], value
            if isinstance(new, list):
                got = [g if g != -1 else n for g, n in zip(got, new, strict=False)] if len(got) == len(new) else got
            if got != new:
                self._note(call, old, new, got)
                args[position] = value
        return args

    def _note(self, call: Call, old: Any, want: Any, got: Any) -> None:
        triples = zip(old, want, got, strict=False) if isinstance(want, list) else [(old, want, got)]
        for before, new, found in triples:
            if new != found:
                op = op_name(call.node)
                self.notes.append(Note(self.at, self.stack.current, call.source, op, int(before), int(new), int(found)))

    def _check(self, call: Call, out: Any) -> None:
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not isinstance(first, Tensor) or call.node.target is getitem:
            return
        expected = self.shapes.shape(call.node, self.choice)
        if tuple(first.shape) != expected and first.numel():
            raise MendError(
                f"op {op_name(call.node)} of the small model gives shape {tuple(first.shape)}, predicted was {expected}",
                where=self.place(),
                why="the model's code uses a size that surgeon did not see",
                fix="compute the size from the tensor's shape in the model's forward, or keep the layer with ignore=[...]",
            )


def _alike(op: Any) -> str:
    name = op._schema.name.removeprefix("aten::")
    return _ALIKE.get(name, name)


# -- what to change -------------------------------------------------------------------------------------------------


def _propose(small: nn.Module, notes: list[Note], refused: set[tuple[str, str, str]]) -> list[Edit]:
    """One edit per module that has notes: an attribute of it or of a parent, else a literal of its forward."""
    by_module: dict[str, list[Note]] = defaultdict(list)
    for note in notes:
        by_module[note.module].append(note)
    edits: dict[tuple[str, str, str], Edit] = {}
    for path, own in by_module.items():
        found = _attribute(small, path, own, refused) or _literal(small, path, own, refused)
        if found is not None:
            edits.setdefault((found.module, found.kind, found.name), found)
    return list(edits.values())


def _attribute(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> Edit | None:
    """An attribute of the module or of one that holds it: the one that explains most notes, exact matches first."""
    owner: str | None = path
    while owner is not None:
        best: tuple[tuple[int, int], Edit] | None = None
        for name, value in integers(small.get_submodule(owner)):
            if (owner, "attribute", name) in refused or value <= 0:
                continue
            for note in notes:
                if note.old % value or note.got % value or (note.old // value) == 0:
                    continue
                times = note.got // value
                if note.want % times or note.want // times == value:
                    continue
                new = note.want // times
                fits = sum(_explains(n, value, new) for n in notes)
                rank = (fits, -times)
                if best is None or rank > best[0]:
                    best = (rank, Edit(owner, "attribute", name, value, new))
        if best is not None:
            return best[1]
        owner = owner.rpartition(".")[0] if "." in owner else ("" if owner else None)
    return None


def _explains(note: Note, value: int, new: int) -> bool:
    return note.got % value == 0 and note.got // value * new == note.want


def _literal(small: nn.Module, path: str, notes: list[Note], refused: set[tuple[str, str, str]]) -> Edit | None:
    """A number in the module's own traced forward that is the old size."""
    try:
        traced = trace_one(small.get_submodule(path))
    except Exception:  # noqa: BLE001  # torch.fx raises anything that the traced code raises; no trace means no literal
        return None
    for note in notes:
        for name, value in literals(traced):
            if value == note.got and (path, "literal", name) not in refused and _same_call(name, note.op):
                return Edit(path, "literal", name, value, note.want)
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
    return called in _CALLS.get(_ALIKE.get(op, op), (op, op.removeprefix("native_"), op.removeprefix("new_")))


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
    """Edits after which the modules below them have no fewer notes."""
    return [edit for edit in trial if _below(after, edit.module) >= _below(before, edit.module)]


def _below(notes: list[Note], path: str) -> int:
    return sum(n.module == path or n.module.startswith(f"{path}.") or not path for n in notes)


