"""find_groups(propagation, solution) -> groups: which units there are, and in which steps they may leave.

A *unit* is an atom that touches slots and is not frozen. Units that touch the same slots form a group. Where
a balance asks that several rows keep equally many (columns of heads, halves of a chunk), the group has a
*balanced set* for each of them, and one step removes one unit from every set; otherwise there is a single set and a
step is a unit.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np
from torch import fx

from surgeon.coupling.balanced_steps import BalancedSets, find_balanced_sets
from surgeon.coupling.cells import cells_of, is_row, kinds_of
from surgeon.coupling.frozen import FrozenGroup, _stuck
from surgeon.coupling.propagate import Propagation, Slot
from surgeon.coupling.solution import Solution
from surgeon.ops.ids import DimIds


@dataclasses.dataclass(frozen=True)
class Member:
    """The indices of one slot that belong to a group: `index[i]` leaves with unit `unit[i]` (a number in 0 ..
    units - 1).
    """

    tensor: str
    dim: int
    index: DimIds
    unit: DimIds


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that touch the same slots.

    Attributes:
        name: the first tensor that it touches, and which part of a grid it is.
        sets: [sets, steps] atoms; step j removes one unit of every balanced set (which one is a matter of scores).
        members: the slots and their indices, by unit; units are numbered set by set.
        strata: [sets, steps] numbers: units of a set with the same number touch the same slots. Usually all
            are alike.
        kind: "channels", or "rows" / "columns" of a grid (heads and head dims, groups and channels per
            group), or "middle": columns of one grid that are rows of the next.
        grid: groups of one grid share a number; rows and columns of a grid are alternatives. -1 without a
            grid.
        batched: rows that some op computes one by one (heads, groups of a convolution), so that whole rows
            may well go.
        attention: "heads" or "head dims" of an attention, "" for everything else.
        producers: names of the tensors in whose ops' outputs its channels are: its layers, as users name
            them.
    """

    name: str
    sets: DimIds
    members: tuple[Member, ...]
    strata: DimIds
    kind: str = "channels"
    grid: int = -1
    batched: bool = False
    attention: str = ""
    producers: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """How many times something could be removed; at least one step always stays."""
        return int(self.sets.shape[1])

    @property
    def units(self) -> int:
        """How many units the group has."""
        return int(self.sets.size)

    @property
    def width(self) -> int:
        """Channels of the first slot that belong to the group: what `round_to` rounds."""
        return len(self.members[0].index)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that its units are indices of."""
        return tuple((m.tensor, m.dim) for m in self.members)


def find_groups(propagation: Propagation, solution: Solution) -> tuple[list[Group], list[FrozenGroup]]:
    """All groups in the order of the first slot that each touches, and units that no step of any group can
    remove.
    """
    slots = list(propagation.slots)
    touches = _touches(propagation, solution, slots)
    sets_of = find_balanced_sets(solution)
    atoms, slot_of, index_of = touches
    loose = ~solution.frozen[atoms]
    atoms, slot_of, index_of = atoms[loose], slot_of[loose], index_of[loose]
    cells = cells_of(propagation, solution)
    families, stratum = _families(atoms, slot_of, sets_of, len(slots), is_row(solution, cells))
    groups_of = np.full(len(solution.root), -1, dtype=np.int64)
    unit_of = np.full(len(solution.root), -1, dtype=np.int64)
    for number, sets in enumerate(families):
        groups_of[sets.ravel()] = number
        unit_of[sets.ravel()] = np.arange(sets.size)
    members = _members(groups_of, unit_of, atoms, slot_of, index_of, slots, len(families))
    kinds, grids = kinds_of(solution, cells, groups_of, families)
    made = {
        name: set(groups_of[np.concatenate(parts)].tolist())
        for name, parts in _given(propagation, solution).items()
    }
    found = []
    for number, sets in enumerate(families):
        if members[number]:
            first = members[number][0]
            name = f"{first.tensor}[{first.dim}]" + (
                "" if kinds[number] == "channels" else f" {kinds[number]}"
            )
            batched = bool(solution.batched[sets].any())
            tensors = dict.fromkeys(member.tensor for member in members[number])
            producers = tuple(tensor for tensor in tensors if number in made.get(tensor, ()))
            part = (
                name,
                sets,
                tuple(members[number]),
                stratum[sets],
                kinds[number],
                grids[number],
                batched,
            )
            found.append(Group(*part, _attention(solution, sets), producers or tuple(tensors)))
    order = {slot: i for i, slot in enumerate(slots)}
    found.sort(key=lambda g: order[g.slots[0]])
    found = _unique_names(found)
    return found, _stuck(groups_of, atoms, slot_of, slots)


def outputs_of_tensors(propagation: Propagation, solution: Solution) -> dict[str, DimIds]:
    """Atoms of the channels that the first op gives which meets a tensor, or what is computed from tensors
    alone, with data.

    Which dim of a weight holds a layer's outputs is the op's matter: the first one of a convolution's, the
    second one of a transposed convolution's, of an embedding's and of `x @ weight`.
    """
    return {name: np.unique(np.concatenate(parts)) for name, parts in _given(propagation, solution).items()}


def _given(propagation: Propagation, solution: Solution) -> dict[str, list[DimIds]]:
    """The same in parts, of which some hold the same atoms."""
    owned: dict[fx.Node, set[str]] = {}
    found: dict[str, list[DimIds]] = defaultdict(list)
    known: dict[int, list[DimIds]] = {}  # by dim_ids; many values share one

    def atoms_of(dim_ids: DimIds) -> list[DimIds]:
        if id(dim_ids) not in known:
            known[id(dim_ids)] = [each[each >= 0] for each in solution.atoms(np.unique(dim_ids))]
        return known[id(dim_ids)]

    for node, axes in propagation.axes.items():
        sources = node.all_input_nodes
        if node.op == "get_attr":
            owned[node] = {str(node.target)}
        elif node.op != "placeholder" and all(source in owned for source in sources):
            owned[node] = set().union(*(owned[source] for source in sources))
        elif names := set().union(*(owned.get(source, set()) for source in sources)):
            all_ids = [
                dim_ids
                for part in (axes if isinstance(axes, tuple) else (axes,))
                for dim_ids in part.values()
            ]
            atoms = [each for dim_ids in all_ids for each in atoms_of(dim_ids)]
            for name in names:
                found[name] += atoms
    return {name: parts for name, parts in found.items() if parts}


def _attention(solution: Solution, sets: DimIds) -> str:
    return "heads" if solution.heads[sets].any() else "head dims" if solution.head_dims[sets].any() else ""


def _unique_names(groups: list[Group]) -> list[Group]:
    """Later groups of a name get a number: parts of one tensor can belong to several groups."""
    seen: dict[str, int] = defaultdict(int)
    result = []
    for group in groups:
        seen[group.name] += 1
        again = seen[group.name]
        result.append(dataclasses.replace(group, name=f"{group.name} #{again}") if again > 1 else group)
    return result


def _touches(
    propagation: Propagation, solution: Solution, slots: list[Slot]
) -> tuple[DimIds, DimIds, DimIds]:
    """Parallel arrays (atom, slot number, index): every index of every slot with each atom that takes it
    along.
    """
    sizes = [len(propagation.slots[s]) for s in slots]
    ids = np.concatenate([propagation.slots[s] for s in slots]) if slots else np.zeros(0, dtype=np.int64)
    number = np.repeat(np.arange(len(slots)), sizes)
    index = np.concatenate([np.arange(n) for n in sizes]) if slots else ids
    found = []
    for atoms in solution.atoms(ids):
        valid = atoms >= 0
        found.append((atoms[valid], number[valid], index[valid]))
    if not found:
        return ids, ids, ids
    if len(found) == 1:
        return found[0]
    atom, number, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(number * (int(index.max()) + 1) + index, kind="stable")
    return atom[order], number[order], index[order]


def _families(
    atoms: DimIds, slot_of: DimIds, sets: BalancedSets, slots: int, is_row: DimIds
) -> tuple[list[DimIds], DimIds]:
    """[sets, steps] atoms per group, in order of first appearance; and of each atom, a number for the slots
    that it touches.
    """
    stratum = np.zeros(len(sets.label), dtype=np.int64)
    if not atoms.size:
        return [], stratum
    weights = np.random.default_rng(1).random(
        slots
    )  # entries come slot by slot, so equal slots give bit-equal sums
    sums = np.bincount(atoms, weights=weights[slot_of])
    unique = np.flatnonzero(sums)
    signature = sums[unique] + is_row[unique]
    first_seen = np.zeros(len(sums), dtype=np.int64)
    first_seen[atoms[::-1]] = np.arange(len(atoms))[::-1]
    order = np.argsort(first_seen[unique])
    unique, signature = unique[order], signature[order]
    label = sets.label[unique]
    stratum[unique] = np.unique(signature, return_inverse=True)[1]
    families: list[tuple[int, DimIds]] = []
    plain = label == 0
    for key in dict.fromkeys(signature[plain].tolist()):
        where = np.flatnonzero(plain & (signature == key))
        families.append((int(where[0]), unique[where][None]))
    seen: set[int] = set()
    for key in dict.fromkeys(label[~plain].tolist()):
        taken = sets.steps_of.get(key, {})
        if key in seen or not taken:
            continue
        seen |= set(taken)
        units = {one_set: unique[label == one_set] for one_set in taken}
        steps = min(len(units[one_set]) // count for one_set, count in taken.items())
        if steps:
            parts = [
                units[one_set][i::count][:steps] for one_set, count in taken.items() for i in range(count)
            ]
            families.append((int(np.flatnonzero(label == key)[0]), np.stack(parts)))
    return [family for _, family in sorted(families, key=lambda f: f[0])], stratum


def _members(
    groups_of: DimIds,
    unit_of: DimIds,
    atoms: DimIds,
    slot_of: DimIds,
    index_of: DimIds,
    slots: list[Slot],
    count: int,
) -> list[list[Member]]:
    group = groups_of[atoms]
    members: list[list[Member]] = [[] for _ in range(count)]
    valid = group >= 0
    group, atoms, slot_of, index_of = group[valid], atoms[valid], slot_of[valid], index_of[valid]
    order = np.argsort(
        group.astype(np.uint16) if count < 1 << 16 else group, kind="stable"
    )  # they come in order of slots
    group, atoms, slot_of, index_of = group[order], atoms[order], slot_of[order], index_of[order]
    cuts = np.flatnonzero((np.diff(group) != 0) | (np.diff(slot_of) != 0)) + 1
    units = unit_of[atoms]
    ends = [*cuts.tolist(), len(group)] if len(group) else []
    for first, last in zip([0, *ends], ends, strict=False):
        tensor, dim = slots[slot_of[first]]
        members[group[first]].append(Member(tensor, dim, index_of[first:last], units[first:last]))
    return members
