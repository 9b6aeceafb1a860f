"""Held: which units the outputs or inputs of ignored modules hold, and the groups that are left without
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link, reachable
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.errors import InputError
from surgeon.graph.graph import Graph
from surgeon.graph.queries import nodes_inside
from surgeon.ops.ids import DimIds


@dataclasses.dataclass(frozen=True)
class Ignored:
    model: nn.Module
    graph: Graph
    propagation: Propagation
    solution: Solution

    def units(self, ignore: Iterable[nn.Module | str], ignore_inputs: Iterable[nn.Module | str]) -> DimIds:
        """Whether each atom is held.

        Raises:
            InputError: an item is no module that ran, and no tensor.
        """
        held = np.zeros(len(self.solution.root), dtype=bool)
        for items, dim_ids_of in ((ignore, self._outputs_of), (ignore_inputs, self._inputs_of)):
            for item in (items,) if isinstance(items, str | nn.Module) else items:
                for dim_ids in dim_ids_of(item):
                    for atoms in self.solution.atoms(dim_ids):
                        held[atoms[atoms >= 0]] = True
        return held

    def groups_left(self, groups: list[Group], links: Sequence[Link], held: DimIds) -> list[Group]:
        """Groups less the held units; groups of several balanced sets or with links stay whole or not at all."""
        if not held.any():
            return groups
        linked = {name for link in links for name in link}
        whole = {g.name for g in groups if held[g.sets].any() and (len(g.sets) > 1 or g.name in linked)}
        whole = reachable(whole, links)
        kept = []
        for group in groups:
            free = ~held[group.sets].any(axis=0)
            if group.name in whole or not free.any():
                continue
            kept.append(group if free.all() else _restricted(group, free))
        return kept

    def _outputs_of(self, item: nn.Module | str) -> list[DimIds]:
        path = self._path(item, "ignore")
        if path in self.graph.tensors:
            return [ids for (name, _), ids in self.propagation.slots.items() if name == path]
        nodes = self._nodes_of(path, "ignore")
        given = {n for n in nodes if any(user.op == "output" or user not in nodes for user in n.users)}
        return self._tracks(given)

    def _inputs_of(self, item: nn.Module | str) -> list[DimIds]:
        nodes = self._nodes_of(self._path(item, "ignore_inputs"), "ignore_inputs")
        read = {used for node in nodes for used in node.all_input_nodes}
        return self._tracks(node for node in read if node not in nodes and node.op != "get_attr")

    def _path(self, item: nn.Module | str, argument: str) -> str:
        return item if isinstance(item, str) else path_of(self.model, item, f"{argument} holds")

    def _nodes_of(self, path: str, argument: str) -> set[fx.Node]:
        found = set(nodes_inside(self.graph, path))
        if not found:
            raise InputError(
                f"{argument} names {path!r}, which is no module that ran{' and no tensor' if argument == 'ignore' else ''}",
                fix="use names as in model.named_modules() or model.named_parameters()",
            )
        return found

    def _tracks(self, nodes: Iterable[fx.Node]) -> list[DimIds]:
        found = []
        for node in nodes:
            axes = self.propagation.axes[node]
            found += [
                dim_ids
                for part in (axes if isinstance(axes, tuple) else (axes,))
                for dim_ids in part.values()
            ]
        return found


def path_of(model: nn.Module, part: Any, said: str = "got") -> str:
    """The name of a module within a model.

    Raises:
        InputError: it is no part of the model.
    """
    path: str | None = next((p for p, m in model.named_modules() if m is part), None)
    if path is None:
        raise InputError(
            f"{said} a {type(part).__name__} that is not part of the model",
            fix="pass one of model.modules(), or a name as in model.named_modules()",
        )
    return path


def _restricted(group: Group, free: DimIds) -> Group:
    """The group with only some of its units (a single balanced set)."""
    number = np.full(group.units, -1, dtype=np.int64)
    number[free] = np.arange(int(free.sum()))
    members = []
    for member in group.members:
        stays = number[member.unit] >= 0
        if stays.any():
            members.append(
                dataclasses.replace(member, index=member.index[stays], unit=number[member.unit[stays]])
            )
    return dataclasses.replace(
        group, sets=group.sets[:, free], strata=group.strata[:, free], members=tuple(members)
    )
