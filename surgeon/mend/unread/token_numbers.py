"""Numbers in a model's modules and configs that are ids of tokens, or say how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.graph.module_tree import named_modules
from surgeon.mend.attribute_path import integers
from surgeon.mend.config_model import numbers_of
from surgeon.mend.edits import Edit
from surgeon.mend.unread.widths import follow_widths

_SPECIAL = ("token_id", "token_ids")  # how names of numbers end that are ids
_CONFIGS = ("config", "generation_config")


def special_ids(
    model: nn.Module, graph: Graph, named: Sequence[str], rows: int, new: Mapping[int, int]
) -> list[Edit]:
    """Ids that the model itself names: padding rows, and what configs call a token's id.

    Raises:
        InputError: one of them is not kept.
    """
    places: list[tuple[str, str, int]] = []
    owners = {name.rpartition(".")[0] for name in _every_name(graph, named)}
    for path, module in named_modules(model):
        padding = getattr(module, "padding_idx", None)
        if path in owners and isinstance(padding, int) and not isinstance(padding, bool):
            places.append((path, "padding_idx", padding))
        for held in _CONFIGS:
            for name, number in numbers_of(getattr(module, held, None)):
                parts = [part for part in name.split(".") if not part.isdigit()]
                if parts[-1].endswith(_SPECIAL) and number < rows:
                    places.append((path, f"{held}.{name}", number))
    missing = {number: f"{path}.{name}".lstrip(".") for path, name, number in places if number not in new}
    if missing:
        raise InputError(
            f"keep leaves out ids that the model itself names: {', '.join(map(str, sorted(missing)))}",
            where=", ".join(missing.values()),
            fix="add them to keep",
        )
    unlike = [(path, name, number) for path, name, number in places if new[number] != number]
    return once(model, [Edit(path, "attribute", name, number, new[number]) for path, name, number in unlike])


def once(model: nn.Module, edits: Sequence[Edit]) -> list[Edit]:
    """Modules share their config: each number of it is changed once."""
    known: dict[tuple[int, str], Edit] = {}
    for edit in edits:
        module = model.get_submodule(edit.module)
        held, _, rest = edit.name.partition(".")
        owner = getattr(module, held) if rest else module
        known.setdefault((id(owner), rest or held), edit)
    return list(known.values())


def _every_name(graph: Graph, named: Sequence[str]) -> list[str]:
    return [*named, *(alias for alias, name in graph.aliases.items() if name in named)]


def counts(
    model: nn.Module, small: nn.Module, graph: Graph, cut: Iterable[str], rows: int, left: int
) -> tuple[list[Edit], list[Edit]]:
    """Edits of numbers that say how many ids there are, and of those that may say it.

    Args:
        small: the model with smaller tables.
        cut: names of the tensors that lost entries.
        rows, left: how many ids there were, and are.
    """
    unread = follow_widths(small, model, graph)[0]
    named = [
        Edit(path, "attribute", name, rows, left)
        for path, module in named_modules(model)
        for name, value in _numbers(module)
        if value == rows and name.rpartition(".")[2] == "vocab_size"
    ]
    first = once(model, [*named, *(edit for edit in unread if edit.old == rows)])
    held = {(edit.module, edit.name) for edit in first}
    others = [
        Edit(path, "attribute", name, rows, left)
        for path, module in named_modules(model)
        for name, value in integers(module)
        if value == rows and (path, name) not in held and _above(path, cut)
    ]
    return first, once(model, others)


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    yield from integers(module)
    for held in _CONFIGS:
        for name, number in numbers_of(getattr(module, held, None)):
            yield f"{held}.{name}", number


def _above(path: str, kept: Iterable[str]) -> bool:
    """Whether a module holds one of the tensors, or a module that does."""
    return any(not path or name.startswith(f"{path}.") for name in kept)
