"""Gates: each unit has a gate that learns whether to stay open; hard concrete gates (Louizos et al., Learning
Sparse Neural Networks through L0 Regularization, 2018).

A gate stands where a unit is *read*: it scales the columns of the weights that sum over the unit, of every
layer that does (of a head, the columns of the projection after the attention). So a closed gate takes away
just what a cut would, whatever biases, batch norms and activations lie between; a gate on the filters would
be undone by the next batch norm. Two limits: groups that something else than a weight reads (dims of queries,
by keys) have no such place and are left out; and a norm over the units themselves (LayerNorm) still counts
those with closed gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from surgeon.coupling.groups import Group, Member
from surgeon.criteria.data.consumers import Consumer, find_consumers
from surgeon.cut.inspected import Inspected
from surgeon.errors import InputError
from surgeon.graph.arguments import arguments
from surgeon.ops.ids import DimIds
from surgeon.ops.table import Family, family, op_name
from surgeon.training.penalty import Regularizer

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch, as in the paper


class Gates(Regularizer):
    """strength * sum over units of the probability that the gate is open.

    While the model trains, each forward draws gates; in eval mode it takes them at rest. The gates are
    parameters of this object: add them to the optimizer (`surgeon.finetune` does). Train with `reg()` or, in
    several processes, `reg.step()`, which averages their gradients. Then cut:

        reg.bake()
        plan = surgery.plan(reg.ratios(), criterion=reg.scores, round_to=1)

    Attributes:
        log_alpha: one number for each unit, group by group; the gate is the more open the larger it is.
    """

    group_options: Mapping[str, Any] = {"weight_decay": 0.0}

    def __init__(
        self,
        surgery: Inspected,
        strength: float,
        groups: list[Group],
        chosen: bool,
        open_share: float,
        seed: int,
    ) -> None:
        if not 0 < open_share < 1:
            raise InputError(f"open_share must be in (0, 1), got {open_share!r}")
        places = _Places(surgery)
        slots = {group.name: places.of(group) for group in groups}
        without = [name for name, found in slots.items() if not found]
        if len(without) == len(groups) or (without and chosen):
            raise InputError(
                "regularizer 'l0' needs groups that weights alone read",
                where=", ".join(without[:10]),
                why="its gates scale the weights that sum over a unit",
                fix="leave these groups out of groups=[...], or use 'group_lasso'",
            )
        super().__init__(surgery, strength, [g for g in groups if slots[g.name]], without)
        starts = np.cumsum([0, *(group.units for group in self.groups)]).tolist()
        self._starts = {group.name: start for group, start in zip(self.groups, starts, strict=False)}
        noise = torch.randn(starts[-1], generator=torch.Generator().manual_seed(seed)) * 0.01
        # the probability that a gate is open is sigmoid(log_alpha - shift)
        self._shift = _BETA * math.log(-_GAMMA / _ZETA)
        device = next(iter(self._tensors.values())).device
        self.log_alpha = nn.Parameter(
            (noise + math.log(open_share / (1 - open_share)) + self._shift).to(device)
        )
        self._gated: dict[str, list[tuple[Member, int]]] = {}
        for group in self.groups:
            for member in slots[group.name]:
                self._gated.setdefault(member.tensor, []).append((member, self._starts[group.name]))
        self._holders = _holders(surgery, self._gated)
        model = surgery.model
        self._hooks = [
            model.register_forward_pre_hook(lambda module, _args: self._enter(module)),
            model.register_forward_hook(lambda _module, _args, _output: self._leave(), always_call=True),
        ]

    def forward(self) -> Tensor:
        """The expected number of open gates, times the strength (Louizos et al., Learning Sparse Neural Networks through L0
        Regularization, 2018).
        """
        return torch.sigmoid(self.log_alpha - self._shift).sum() * self.strength

    def gates(self, drawn: bool = False) -> Tensor:
        """One number in [0, 1] for each unit: at rest, or drawn (from torch's generator)."""
        if drawn:
            u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / _BETA)
        else:
            s = torch.sigmoid(self.log_alpha)
        return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def scores(self, group: Group, tensors: Mapping[str, Tensor]) -> DimIds:
        """A criterion for `Surgery.plan`: units whose gates are the least open leave first. Groups without
        gates are all alike.

        Raises:
            InputError: the group has no gates and shares a layer with one that is to lose units.
        """
        if group.name not in self._starts:
            asked = self.ratios()
            if any(asked.get(name) for name in group.producers):
                raise InputError(
                    "this group has no gates, but shares a layer with one that is to lose units",
                    where=group.name,
                    fix='let the plan take only what has gates, with heads="whole" or ignore=[...]',
                )
            return np.zeros(group.units)
        start = self._starts[group.name]
        found: DimIds = self.log_alpha[start : start + group.units].detach().double().cpu().numpy()
        return found

    def ratios(self) -> dict[str, float]:
        """A ratio for `Surgery.plan`: of each gated group the share of units whose gates are closed, of all
        else nothing.

        Ratios go by layer: where several groups share a layer's outputs (rows and columns of a grid), the
        largest share counts for all.
        """
        rest = self.gates().detach()
        found = {"*": 0.0}
        for group in self.groups:
            start = self._starts[group.name]
            closed = float((rest[start : start + group.units] == 0).double().mean())
            found |= {name: max(closed, found.get(name, 0.0)) for name in group.producers}
        return found

    @torch.no_grad()
    def bake(self) -> None:
        """Multiply the gates at rest into the weights, and take the gates off the model."""
        for name, weight in self._scaled(self.gates()).items():
            self._tensors[name].copy_(weight)
        for hook in self._hooks:
            hook.remove()

    def _scaled(self, gates: Tensor) -> dict[str, Tensor]:
        """The gated weights times their gates."""
        found = {}
        for name, slots in self._gated.items():
            weight: Tensor = self._tensors[name]
            for member, start in slots:
                index, unit = self._place(member, weight.device)
                scale = torch.ones(weight.shape[member.dim], dtype=weight.dtype, device=weight.device)
                scale = scale.index_put((index,), gates.to(weight.device, weight.dtype)[start + unit])
                weight = weight * scale.reshape([-1 if d == member.dim else 1 for d in range(weight.dim())])
            found[name] = weight
        return found

    def _enter(self, model: nn.Module) -> None:
        for name, weight in self._scaled(self.gates(drawn=model.training)).items():
            for parameters, key in self._holders[name]:
                parameters[key] = weight  # the module finds it where its parameter was

    def _leave(self) -> None:
        for name, holders in self._holders.items():
            for parameters, key in holders:
                parameters[key] = self._tensors[name]


def _holders(surgery: Inspected, names: Mapping[str, Any]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Name of a tensor -> the modules' dicts that hold it, and its keys there; several for tied weights."""
    every: dict[str, list[str]] = {name: [name] for name in names}
    for alias, name in surgery.graph.aliases.items():
        if name in every:
            every[name].append(alias)
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for name, aliases in every.items():
        split = [alias.rpartition(".") for alias in aliases]
        found[name] = [(surgery.model.get_submodule(path)._parameters, key) for path, _, key in split]
    return found


class _Places:
    """Where the units of a group are read: the slots of weights that sum over them."""

    def __init__(self, surgery: Inspected) -> None:
        self._surgery = surgery
        self._consumers = find_consumers(surgery.graph, surgery.propagation, surgery.solution.atoms)
        self._labels = [_labels(surgery, consumer) for consumer in self._consumers]
        self._ends = [(node, _ending(surgery, node)) for node in surgery.graph.fx.nodes if _computes(node)]

    def of(self, group: Group) -> list[Member]:
        """The slots; none if anything but a weight reads the units."""
        unit_of = np.full(len(self._surgery.solution.root), -1, dtype=np.int64)
        unit_of[group.sets.ravel()] = np.arange(group.units)
        found: dict[tuple[str, int], Member] = {}
        readers = set()
        for consumer, (name, labels) in zip(self._consumers, self._labels, strict=True):
            units = np.max([np.where(atoms >= 0, unit_of[atoms], -1) for atoms in consumer.atoms], axis=0)
            if (units < 0).all():
                continue
            readers.add(consumer.node)
            grid = units.reshape(consumer.shape)
            if consumer.moving and (grid == grid[:, :1]).all():
                continue  # heads of queries and keys are multiplied one by one: what reads a head comes later
            member = next(
                (m for m in group.members if m.tensor == name and _reads(m, labels.get(m.dim), units)), None
            )
            if member is None:
                return []
            found[member.tensor, member.dim] = member
        for node, atoms in self._ends:
            if node not in readers and (unit_of[atoms] >= 0).any():
                return []
        return list(found.values())


def _labels(surgery: Inspected, consumer: Consumer) -> tuple[str, dict[int, DimIds]]:
    """The parameter that a consumer sums with, and for each of its dims that numbers the entries summed over:
    their indices there.

    The ops between the parameter and the consumer are run on the indices, as they are on ids.
    """
    node: Any = arguments(consumer.node)[consumer.weight]
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        chain.append(node)
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or consumer.moving:
        return "", {}
    tensor = surgery.graph.tensors[str(node.target)]
    found = {}
    for dim in range(tensor.dim()):
        index = torch.arange(tensor.shape[dim], dtype=torch.float64)
        labels = (
            index.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
            .expand(tensor.shape)
            .contiguous()
        )
        for step in reversed(chain):
            labels = _rerun(step, labels)
        fan = consumer.fan(labels).flatten(0, 1)
        if bool((fan == fan[:, :1]).all()):
            found[dim] = fan[:, 0].long().numpy()
    return str(node.target), found


def _rerun(node: fx.Node, value: Tensor) -> Tensor:
    """An op with one tensor operand, on another tensor."""
    found: Tensor = node.target(*fx.node.map_arg(node.args, lambda _: value), **node.kwargs)  # type: ignore[operator]  # an op
    return found


def _reads(member: Member, labels: DimIds | None, units: DimIds) -> bool:
    """Whether the entries with these labels in a slot are those of the units."""
    if labels is None:
        return False
    unit_of = dict(zip(member.index.tolist(), member.unit.tolist(), strict=True))
    return all(
        unit_of.get(label, -1) == unit for label, unit in zip(labels.tolist(), units.tolist(), strict=True)
    )


def _computes(node: fx.Node) -> bool:
    """Whether an op computes with what it reads; one that moves it, or takes a part, only passes it on."""
    return node.op == "call_function" and family(op_name(node)) is not Family.MOVEMENT


def _ending(surgery: Inspected, node: fx.Node) -> DimIds:
    """The atoms that an op reads and does not pass on."""

    def carried(nodes: Any) -> DimIds:
        found = [np.zeros(0, dtype=np.int64)]
        for value in nodes:
            axes = surgery.propagation.axes.get(value, {})
            for part in axes if isinstance(axes, tuple) else (axes,):
                for dim_ids in part.values():
                    found += [atoms[atoms >= 0] for atoms in surgery.solution.atoms(dim_ids.ravel())]
        return np.unique(np.concatenate(found))

    return np.setdiff1d(carried(node.all_input_nodes), carried([node]))
