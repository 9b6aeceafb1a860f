"""Configs: the config of a small model brought in step with its widths, and plans that a config can say."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from surgeon.capture.model_state import output_of, quiet_run
from surgeon.coupling.groups import Group
from surgeon.coupling.propagate import Slot
from surgeon.errors import PlanError
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import tensor_leaves
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.attribute_path import get_path
from surgeon.mend.checking.size_check import compare
from surgeon.mend.config_model import ConfigModel, ConfigSizes, Values, numbers_of, sizes_of
from surgeon.mend.edits import Edit
from surgeon.selection.cost import Choice, ShapeModel

_RUNS = 12  # models that are built and run for one plan


def configure(
    blueprint: ConfigModel, small: nn.Module, runs: Sequence[Graph], shapes: ShapeModel, choice: Choice
) -> tuple[Edit, ...] | str:
    """Bring the small model's config in step with its widths.

    Returns:
        The edits that did so, or a sentence that says why no config says these widths; the small model is
        then as it was.
    """
    tensors = runs[0].tensors
    shares = {
        Fraction(len(kept), tensors[name].shape[dim])
        for name, dims in shapes.kept(choice).items()
        for dim, kept in dims.items()
    }
    found = _express(blueprint, small, runs[0], shares)
    if isinstance(found, str):
        return found
    edits = _config_edits(blueprint, small, found)
    for edit in edits:
        apply_edit(small, edit)
    if not compare(small, runs, shapes, choice):
        return edits
    for edit in reversed(edits):
        apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))
    return "the small model's code needs other numbers in it"


def _express(
    blueprint: ConfigModel, small: nn.Module, graph: Graph, shares: Collection[Fraction]
) -> Values | str:
    """Changes of the config that build a model which, with the small model's weights, computes the same bit
    for bit.

    Args:
        small: the model that was cut.
        graph: the original's recorded run; its inputs are used.
        shares: of channels that the plan keeps, slot by slot.

    Returns:
        The changed numbers, or a sentence that says why there are none.
    """
    target = sizes_of(small)
    mute = [
        slot
        for slot, size in target.items()
        if slot not in blueprint.responses and size != blueprint.base.get(slot)
    ]
    if mute:
        return f"no number of the config says the size of {_name(mute[0])}"
    if any(tensor.is_meta for tensor in small.parameters()):
        return "the model has no values (meta device), so that no config could be checked"
    outputs: list[Tensor] = []
    for values in itertools.islice(blueprint.fits(target, shares), _RUNS):
        outputs = outputs or _run(small, graph)
        if _same(blueprint, values, small, graph, outputs):
            return values
    if outputs:
        return "a model built with these sizes computes something else (constants that it derives from a size, say)"
    slot, fields = _odd_one(blueprint, target)
    return f"{_name(slot)} has size {target[slot]}, but {fields or 'the config'} holds for other layers too"


def _odd_one(blueprint: ConfigModel, target: ConfigSizes) -> tuple[Slot, str]:
    """A slot whose share disagrees with that of most others that the same numbers say."""
    shares: dict[str, dict[Fraction, list[Slot]]] = defaultdict(lambda: defaultdict(list))
    for slot, responses in blueprint.responses.items():
        if slot in target:
            shares[", ".join(responses)][Fraction(target[slot], blueprint.base[slot])].append(slot)
    for fields, slots in shares.items():
        if len(slots) > 1:
            return min(slots.values(), key=len)[0], fields
    return next(slot for slot, size in target.items() if size != blueprint.base.get(slot)), ""


def _same(
    blueprint: ConfigModel, values: Values, small: nn.Module, graph: Graph, outputs: list[Tensor]
) -> bool:
    """Whether the config, written and read again, builds a model that computes the very same with the small
    one's weights.
    """
    config = blueprint.changed(values)
    built = blueprint.build(values, "cpu")
    if built is None:
        return False
    try:
        if dict(numbers_of(type(config).from_dict(config.to_dict()))) != dict(numbers_of(config)):
            return False
        built.load_state_dict(small.state_dict(), assign=True)
        found = _run(built.to(next(small.parameters()).device), graph)
    except Exception:  # noqa: BLE001  # whatever a config or a wrongly built model raises: it is not the same
        return False
    return len(found) == len(outputs) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(found, outputs, strict=True)
    )


def restrict(
    blueprint: ConfigModel, groups: Iterable[Group], aliases: Mapping[str, str]
) -> tuple[list[tuple[str, str]], set[str]]:
    """Pairs of groups whose sizes one number says, so that they must keep the same share; and groups that may
    not shrink.

    Those are groups with a slot that no number says, or of which a number says a slot too that must stay.

    Args:
        aliases: other names of tied tensors, as in `Graph.aliases`.
    """
    fields_of: dict[str, set[str]] = {}
    free: dict[Slot, set[int]] = defaultdict(set)
    fixed: set[str] = set()
    for group in groups:
        fields_of[group.name] = {field for slot in group.slots for field in blueprint.responses.get(slot, {})}
        if any(slot not in blueprint.responses for slot in group.slots):
            fixed.add(group.name)
        for member in group.members:
            free[member.tensor, member.dim].update(member.index.tolist())
    held = {
        field
        for (name, dim), fields in blueprint.responses.items()
        if len(free[aliases.get(name, name), dim]) < blueprint.base[name, dim]
        for field in fields
    }
    fixed |= {name for name, fields in fields_of.items() if fields & held}
    first: dict[str, str] = {}
    links = {(first.setdefault(field, name), name) for name, fields in fields_of.items() for field in fields}
    return sorted((a, b) for a, b in links if a != b), fixed


def _config_edits(blueprint: ConfigModel, small: nn.Module, values: Values) -> tuple[Edit, ...]:
    """The edits that bring the small model's config to these numbers."""
    found = []
    for name, new in {**blueprint.values, **values}.items():
        old = get_path(small.config, name)
        if old != new:
            found.append(Edit("", "attribute", f"config.{name}", old, new))
    return tuple(found)


def unsaid(reason: str) -> PlanError:
    """What to raise if a config was to say the new widths, and cannot."""
    return PlanError(
        "the model's config cannot say the new widths",
        why=reason,
        fix="leave config_expressible out, and keep the small model with surgeon.save(small, folder)",
    )


def _run(model: nn.Module, graph: Graph) -> list[Tensor]:
    with quiet_run(model, seed=0):
        return [tensor for _, tensor in tensor_leaves(output_of(model, graph.args, graph.kwargs))]


def _name(slot: Slot) -> str:
    return f"{slot[0]}[{slot[1]}]"
