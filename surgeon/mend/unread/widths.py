"""follow_widths(small, model, graph) -> edits, undecided: whole numbers of modules that no forward reads but that say a
width, such as the `num_features` from which a new head is made.

A number follows a width if it equals the old size of the nearest cut tensors of its module, all of them have one
new size, and forward does not read it (what forward reads, the run has shown to be right). If some of those
tensors changed and some did not, nothing says which the number means: it is left, and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from surgeon.graph.graph import Graph
from surgeon.graph.module_tree import named_modules
from surgeon.graph.source_code import methods, names_used, own_classes
from surgeon.graph.tensors import named_tensors
from surgeon.mend.attribute_path import integers
from surgeon.mend.edits import Edit
from surgeon.mend.unread.module_lists import numbers_beside_paths

_LEAST = 3  # smaller numbers say how many of something there are
_DEEPEST = 4  # levels of modules below the one that holds the number
_NEAR = 1  # so far below, tensors speak for a number that no method reads either

Sizes = Mapping[str, Sequence[tuple[int, int]]]


def follow_widths(small: nn.Module, model: nn.Module, graph: Graph) -> tuple[list[Edit], list[str]]:
    """The edits that bring unread numbers in step with the widths, and those that may be wrong now, as text.

    Args:
        small: the small model, with all other edits made.
        model: the original; its code says what forward reads, because an edit may have put a traced forward,
            which holds numbers instead of names, in its place.
        graph: a recorded run of the original.
    """
    every = _below(_sizes(small, graph))
    edits: list[Edit] = []
    undecided: list[str] = []
    for path, module in named_modules(small):
        if not own_classes(module):  # torch's own layers are kept in step
            continue
        below = every.get(path, [])
        if not any(old != new for level in below for old, new in level):
            continue
        before = model.get_submodule(path)
        read = _read_by_forward(before)
        was = dict(_numbers(before))
        others = set().union(*(names_used(method) for method in methods(module).values()))
        for name, value in _numbers(module):
            own = name.partition(".")[0]
            if own in read or value != was.get(name):  # what has been mended follows already
                continue
            depth, new = _new_size(below, value)
            if len(new) == 1 and (depth <= _NEAR or own in others):
                edits += [Edit(path, "attribute", name, value, size) for size in new if size != value]
            elif len(new) > 1 and own in others:
                undecided.append(f"{path}.{name} = {value}".removeprefix("."))
    edits += list(numbers_beside_paths(small, graph))
    return _once(edits), undecided


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's own numbers, those in its lists and dicts included; not those of configs and other objects, nor
    those in lists of dicts.
    """
    for name, value in integers(module):
        own = name.partition(".")[0]
        if (
            value >= _LEAST
            and name.count(".") <= 1
            and not own.startswith("_")
            and type(getattr(module, own)) in (int, list, tuple, dict)
        ):
            yield name, value


def _once(edits: list[Edit]) -> list[Edit]:
    return list({(edit.module, edit.name): edit for edit in edits}.values())


def _sizes(small: nn.Module, graph: Graph) -> dict[str, list[tuple[int, int]]]:
    """{tensor name: (old, new) size of each dim}."""
    return {
        name: list(zip(graph.tensors[name].shape, tensor.shape, strict=True))
        for name, tensor in named_tensors(small)
        if name in graph.owned and tensor.dim() == graph.tensors[name].dim()
    }


def _below(sizes: Sizes) -> dict[str, list[set[tuple[int, int]]]]:
    """The sizes of each module's tensors, level by level: its own, those of its parts, of their parts."""
    found: dict[str, list[set[tuple[int, int]]]] = {}
    for name, pairs in sizes.items():
        path, depth = name.rpartition(".")[0], 0
        while depth <= _DEEPEST:
            found.setdefault(path, [set() for _ in range(_DEEPEST + 1)])[depth].update(pairs)
            if not path:
                break
            path, _, last = path.rpartition(".")
            depth += not last.isdigit()
    return found


def _new_size(below: list[set[tuple[int, int]]], value: int) -> tuple[int, set[int]]:
    """What the nearest tensors with a dim of this size have there now, and how far below they are."""
    for depth, level in enumerate(below):
        new = {after for before, after in level if before == value}
        if new:
            return depth, new
    return 0, set()


def _read_by_forward(module: nn.Module) -> set[str]:
    """Names that the code of a module's forward uses, with that of the methods that it names."""
    known = methods(module)
    found: set[str] = set()
    todo = ["forward"]
    while todo:
        name = todo.pop()
        if name in known:
            used = names_used(known.pop(name))
            found |= used
            todo += used
    return found
