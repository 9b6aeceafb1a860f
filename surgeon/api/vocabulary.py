"""vocabulary(model, keep): rows of token tables that nobody needs leave, with the outputs that go with them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgeon.api.pipeline import check_order, inspect
from surgeon.api.surgery import Surgery
from surgeon.api.token_tables import lookups, token_tables
from surgeon.cut.plan import Plan, carrying
from surgeon.cut.pretrained import CONFIG_SAYS
from surgeon.cut.slice import shrink_module
from surgeon.errors import InputError, MendError, ProofError
from surgeon.files import write_atomically
from surgeon.graph.given import MODEL, PATH, check_given
from surgeon.graph.graph import Graph, spec
from surgeon.graph.process import plain_torch
from surgeon.graph.tensors import named_tensors
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit
from surgeon.mend.unread.token_numbers import counts, once, special_ids
from surgeon.proof.token_outputs import compare_tokens
from surgeon.report.text import count
from surgeon.selection.cost import nothing
from surgeon.selection.selection import Selection


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A model for fewer tokens; printable.

    Attributes:
        model: of the same class, with smaller tables.
        plan: what stays.
        ids: old id -> new id, of all that stay.
        tables: names of the tensors that lost entries, with their sizes before and after.
        error: the largest relative difference of the outputs for kept ids, in float64.
    """

    model: nn.Module
    plan: Plan
    ids: Mapping[int, int]
    tables: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    error: float

    def save_ids(self, path: str | os.PathLike[str]) -> None:
        """Write {old id: new id} as JSON, atomically.

        Raises:
            FileError: the path cannot be written.
        """
        check_given("found.save_ids(path)", path=(path, PATH))
        write_atomically(Path(path), json.dumps({str(old): new for old, new in self.ids.items()}).encode())

    def __str__(self) -> str:
        plan = self.plan
        sizes = f"{count(plan.params_before)} -> {count(plan.params)} params"
        head = f"{type(self.model).__name__}: {sizes}; {len(self.ids):,} ids stay, outputs for them within {self.error:.1e}"
        return "\n".join([head, *(f"  {name}: {old} -> {new}" for name, (old, new) in self.tables.items())])


@plain_torch()
def vocabulary(
    model: nn.Module, keep: Iterable[int], example_inputs: Any = None, *, tables: Sequence[str] | None = None
) -> Vocabulary:
    """Keep some of the token ids that a model knows: rows of its tables, of a tied or untied head, and of its biases.

    Ids become 0, 1, ... in ascending order of the old ones; `ids` maps them. What the config and torch's layers say of single
    ids (`pad_token_id`, `padding_idx`) follows. Tokenizers are not touched.

    Args:
        model: it is not touched.
        keep: ids that stay.
        example_inputs: as for `inspect`; ids are among them.
        tables: names of the tables that are looked up by ids, such as ["embed.weight"], if there are several.

    Raises:
        InputError: no table is looked up by inputs, or several; an id is unknown; an id that the model itself names is missing.
        MendError: the model's code holds the number of tokens where it cannot be changed.
        ProofError: outputs for kept ids differ by more than 1e-9 in float64.
    """
    check_given("surgeon.vocabulary(model, keep, example_inputs)", model=(model, MODEL))
    check_order(model, example_inputs)
    ids = _ids(keep)
    surgery = inspect(model, example_inputs)
    graph = surgery.graph
    named = token_tables(graph, ids, tables)
    rows = graph.tensors[named[0]].shape[0]
    if ids[-1] >= rows:
        raise InputError(
            f"keep names id {ids[-1]}, and the model knows {rows:,}", where=named[0], fix="pass ids from 0 on"
        )
    new = {old: place for place, old in enumerate(ids)}
    edits = special_ids(model, graph, named, rows, new)
    selection = _selection(surgery, named, rows, ids)
    small, made, error = _mended(model, graph, selection, named, rows, new, edits)
    said = {CONFIG_SAYS: True} if any(edit.name.endswith(".vocab_size") for edit in made) else {}
    plan = Plan(
        kept=selection.kept, hash=graph.hash, macs=selection.cost.macs, params=selection.cost.params, size=selection.cost.size,
        memory=selection.cost.memory, macs_before=surgery.macs, params_before=surgery.params, edits=tuple(made),
        request={**selection.request, **said},
    )  # fmt: skip
    after = dict(named_tensors(small))
    sizes = {name: (tuple(graph.tensors[name].shape), tuple(after[name].shape)) for name in selection.kept}
    return Vocabulary(carrying(small, model, plan), plan, new, sizes, error)


def _ids(keep: Iterable[int]) -> list[int]:
    given = keep.tolist() if isinstance(keep, Tensor | np.ndarray) else list(keep)
    odd = next(
        (
            item
            for item in given
            if isinstance(item, bool) or not isinstance(item, int | np.integer) or item < 0
        ),
        None,
    )
    if not given or odd is not None:
        raise InputError(
            f"keep holds {odd!r}" if given else "keep holds no id",
            fix="pass whole numbers from 0 on: the ids that stay",
        )
    return sorted({int(item) for item in given})


def _selection(surgery: Surgery, named: Sequence[str], rows: int, ids: list[int]) -> Selection:
    """What stays: the rows of the tables, and whatever is tied to them or gives one number for each id."""
    gone = np.ones(rows, dtype=bool)
    gone[ids] = False
    propagation, solution = surgery.propagation, surgery.solution
    dims = [propagation.slots[name, 0] for name in named]
    for run in surgery.runs:
        for _, node in run.outputs:
            axes = propagation.axes.get(node, {})
            for dim, found in axes.items() if isinstance(axes, dict) else ():
                if found.size == rows == spec(node).shape[dim]:
                    dims.append(found.ravel())
    choice = nothing(solution)
    for found in dims:
        for atoms in solution.atoms(found[gone]):
            choice[atoms[atoms >= 0]] = True
    request = {"vocabulary": len(ids)}
    return Selection.of(surgery.shapes, choice, surgery.cost, request)


def _mended(
    model: nn.Module, graph: Graph, selection: Selection, named: Sequence[str], rows: int, new: Mapping[int, int],
    edits: Sequence[Edit],
) -> tuple[nn.Module, list[Edit], float]:  # fmt: skip
    """The small model with the numbers of its code that say how many ids there are; its edits, and the proof's error."""
    small = shrink_module(model, selection.kept, edits)
    first, others = counts(model, small, graph, selection.kept, rows, len(new))
    fed = {index for table, index in lookups(graph) if str(table.target) in named}
    failed: Exception | None = None
    for tried in (once(model, [*edits, *first]), once(model, [*edits, *first, *others])):
        small = shrink_module(model, selection.kept)
        for edit in tried:
            apply_edit(small, edit)
        try:
            return small, tried, compare_tokens(model, small, graph, fed, rows, new)
        except ProofError:
            raise
        except Exception as error:  # noqa: BLE001  # the model's own code, which may raise anything
            failed = error
    raise MendError(
        "the model does not run with fewer ids",
        where=type(model).__name__,
        why=f"{type(failed).__name__}: {str(failed)[:300]}",
        fix="let its code read the number of ids from the table's size or from an attribute",
    ) from failed
