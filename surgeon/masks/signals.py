"""Signals: a run of the recorded graph that finds out of each channel whether its removal would change anything.

A channel matters where entries of it are summed with others, or counted. There it changes nothing if it is zero for all
inputs, or if the weights that read it are zero. Where it is one number for all inputs, what it adds is a constant, which the
reader's bias can take over (see `fold`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from surgeon.capture.recording.aliasing import getitem
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.cut.plan import Plan
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph
from surgeon.graph.messages import where
from surgeon.graph.nests import map_tensors
from surgeon.masks.dependence import added_to, dependence, mixed_dims, nonzero, outputs_of, some
from surgeon.ops.ids import DimIds
from surgeon.ops.masked_op import MaskedOp, wide
from surgeon.ops.sums import summed_operands
from surgeon.ops.table import Family, family, op_name
from surgeon.proof.drawn import reads_numbers
from surgeon.proof.reference import Reference

ROUNDING = 1e-12  # relative: what an op gives for one number may differ in the last bits from place to place


@dataclasses.dataclass(frozen=True)
class Constants:
    """Channels of one number each that an op sums over.

    Attributes:
        node, value, dim: the op, what it reads, and the dim that is summed over.
        ids: of that dim, [channels].
        numbers: [channels], zero where the channel is no constant or nothing reads it.
        call: the op with its weight at hand.
        shape: of what it reads.
    """

    node: fx.Node
    value: fx.Node
    dim: int
    ids: DimIds
    numbers: Tensor
    call: MaskedOp
    shape: tuple[int, ...]

    def added(self, chosen: DimIds) -> Tensor:
        """What these channels add to the op's result.

        Args:
            chosen: [channels], which of them.
        """
        numbers = self.numbers * torch.from_numpy(chosen).to(self.numbers.device)
        data = numbers.reshape([-1 if d == self.dim else 1 for d in range(len(self.shape))]).expand(
            self.shape
        )
        bias = [item for item in added_to(self.node) if isinstance(item, fx.Node)]

        def read(item: Any) -> Any:
            if item is self.value:
                return data
            return torch.zeros_like(self.call.data(item)) if item in bias else self.call.data(item)

        found: Tensor = self.call.run(read)
        return found


class Signals(Reference):
    """Which classes of ids carry a signal.

    Attributes:
        carries: class -> whether its removal would change what the model computes.
        constants: sums over channels that are constants other than zero.
        stays: class -> why it carries one, for those that are zero or constant where it is needed.

    Args:
        written: names of tensors that forward writes to: the next call finds other numbers there.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        propagation: Propagation,
        solution: Solution,
        written: Collection[str] = (),
    ) -> None:
        everything = Plan(kept={}, hash=graph.hash, macs=0, params=0, macs_before=0, params_before=0)
        super().__init__(model, graph, everything, {}, {})
        self._axes, self._solution = propagation.axes, solution
        self._depends: dict[fx.Node, Any] = {}
        self._written = frozenset(written)
        self.carries = np.zeros(len(solution.root), dtype=bool)
        self.constants: list[Constants] = []
        self.stays: dict[int, str] = {}
        self.alive = False

    @torch.no_grad()
    def look(self) -> None:
        """Run the graph once, in float64, on the inputs that were recorded."""
        graph = self.graph
        self.run(*map_tensors((graph.args, dict(graph.kwargs)), lambda tensor: wide(tensor.detach())))
        self.alive = any(
            bool(self._depends[node].any()) for _, node in graph.outputs if node in self._depends
        )

    def _call(self, node: fx.Node) -> Any:
        for used in node.all_input_nodes:
            if used not in self._depends:  # an input, or a tensor of the model
                data = self.values[used][0]
                read_outside = used.target not in self.graph.owned and bool(self.graph.reads)
                free = used.op == "placeholder" or read_outside or str(used.target) in self._written
                self._depends[used] = torch.full(data.shape, free, device=data.device)
        result = super()._call(node)
        if node.target is not getitem:
            call = MaskedOp(node, op_name(node), arguments(node), self.values)
            plain = [item[0] for item in result] if isinstance(result, list) else result[0]
            self._depends[node] = dependence(call, self._depends, plain, self.fed)
            self._note(call)
        else:  # an item of several results
            self._depends[node] = self._depends[node.args[0]][node.args[1]]  # type: ignore[index]  # a node and a number
        for used in node.all_input_nodes:
            if self.last.get(used) is node and used.op == "call_function" and not self._is_output(used):
                self._depends.pop(used, None)
        return result

    def _is_output(self, node: fx.Node) -> bool:
        return any(node is output for _, output in self.graph.outputs)

    def _note(self, call: MaskedOp) -> None:
        """Mark the classes of what an op sums, counts or orders."""
        own = family(call.name)
        if own is Family.MOVEMENT:  # what it leaves out is not computed with
            return
        noted = self._note_product(call) if own is Family.CONTRACTION else np.zeros(0, dtype=np.int64)
        why = f"{call.name} counts it ({where(call.node)})"
        for operand, dims in {} if own is Family.CONTRACTION else mixed_dims(call.node).items():
            for dim in dims:
                self._block(operand, self._held(operand, dim), why)
        ended = np.setdiff1d(self._carried(call.node.all_input_nodes), self._carried([call.node]))
        self._mark(np.setdiff1d(ended, noted), f"{call.name} reads it ({where(call.node)})", False)

    def _note_product(self, call: MaskedOp) -> DimIds:
        """Mark what a product of data with a weight sums over; the atoms of all that was looked at."""
        operands = sorted(summed_operands(call.node), key=lambda pair: pair[0] not in self.fed)
        if not operands or (operands[0][0] in self.fed) is (operands[1][0] in self.fed):
            return np.zeros(0, dtype=np.int64)
        (value, dim), (weight, of_weight) = operands
        ids = self._held(value, dim)
        if ids is None:
            return np.zeros(0, dtype=np.int64)
        data, width = call.data(value), call.data(value).shape[dim]
        if call.data(weight).shape[of_weight] == 1 < width:  # each channel by itself: nothing is mixed
            return self._atoms(ids)
        read = _read(call.data(weight), of_weight, width)
        wide_read = read.reshape([-1 if d == dim else 1 for d in range(data.dim())])
        rest = [d for d in range(data.dim()) if d < ids.ndim and ids.shape[d] == 1]
        moves = some(self._depends[value] & wide_read, rest).cpu().numpy()
        held = some(nonzero(call, self._depends, value) & wide_read, rest).cpu().numpy() & ~moves
        self._mark(self._atoms(ids[moves.reshape(ids.shape)]), "", False)
        if held.any():
            self._note_constants(call, value, weight, dim, ids, held.reshape(ids.shape), data)
        return self._atoms(ids)

    def _note_constants(
        self,
        call: MaskedOp,
        value: fx.Node,
        weight: fx.Node,
        dim: int,
        ids: DimIds,
        held: DimIds,
        data: Tensor,
    ) -> None:
        others = [d for d in range(data.dim()) if d != dim]
        low, high = data.amin(others), data.amax(others)
        even = (high - low <= ROUNDING * data.abs().amax(others)).cpu().numpy()
        flat = ids.size == data.shape[dim]
        place = f"{call.name} ({where(call.node)})"
        if flat:
            found = held.ravel() & even
            uneven = ids.ravel()[held.ravel() & ~even]
        else:
            found, uneven = np.zeros(data.shape[dim], dtype=bool), ids[held]
        self._mark(self._atoms(uneven), f"it is a constant that differs from place to place at {place}", True)
        if not found.any():
            return
        numbers = torch.where(torch.from_numpy(found).to(low.device), low, torch.zeros_like(low))
        bias = [item for item in added_to(call.node) if isinstance(item, fx.Node)]
        at_hand = {n: self.values[n] for n in (weight, *bias)}
        kept = MaskedOp(call.node, call.name, call.arguments, at_hand)
        made = Constants(call.node, value, dim, ids.ravel(), numbers, kept, tuple(data.shape))
        own = outputs_of(call.node, value)
        result = made.added(found * np.random.default_rng(0).uniform(1, 2, len(found)))
        spread = [d for d in range(result.dim()) if d not in own]
        largest = float(result.abs().max())
        padded = any(call.arguments.get("padding") or ()) if "padding" in call.arguments else False
        if reads_numbers(self.graph):
            why = f"it is a constant at {place}, and the code reads numbers outside of torch, which may be in it"
            self._mark(self._atoms(ids.ravel()[found]), why, True)
        elif padded or (
            spread and float((result.amax(spread) - result.amin(spread)).max()) > ROUNDING * largest
        ):
            why = f"it is a constant beside zero padding at {place}, where no bias can take its place"
            self._mark(self._atoms(ids.ravel()[found]), why, True)
        else:
            self.constants.append(made)

    def block(self, constants: Constants, why: str) -> None:
        """Keep the channels of a sum whose constants nothing can take over."""
        self._mark(self._atoms(constants.ids[(constants.numbers != 0).cpu().numpy()]), why, True)

    def keep(self, atoms: DimIds, why: str) -> None:
        """Keep channels for a reason that this run does not show."""
        self._mark(atoms, why, True)

    def _block(self, operand: fx.Node, ids: DimIds | None, why: str) -> None:
        if ids is None:
            return
        data, depends = self.values[operand][0], self._depends[operand]
        rest = [d for d in range(data.dim()) if ids.shape[d] == 1]
        moves = some(depends, rest).cpu().numpy().reshape(ids.shape)
        self._mark(self._atoms(ids[moves]), "", False)
        self._mark(self._atoms(ids[~moves]), why, True)

    def _mark(self, atoms: DimIds, why: str, constant: bool) -> None:
        if constant:
            self.stays |= {int(atom): why for atom in atoms if not self.carries[atom]}
        self.carries[atoms] = True

    def _held(self, node: fx.Node, dim: int) -> DimIds | None:
        axes = self._axes.get(node, {})
        found: DimIds | None = axes.get(dim) if isinstance(axes, dict) else None
        return found

    def _atoms(self, ids: DimIds) -> DimIds:
        found = [np.zeros(0, dtype=np.int64)]
        found += [atoms[atoms >= 0].ravel() for atoms in self._solution.atoms(ids.ravel())]
        return np.unique(np.concatenate(found))

    def _carried(self, nodes: Any) -> DimIds:
        """The atoms of all dims of some values."""
        found = [np.zeros(0, dtype=np.int64)]
        for value in nodes:
            axes = self._axes.get(value, {})
            for part in axes if isinstance(axes, tuple) else (axes,):
                found += [self._atoms(ids) for ids in part.values()]
        return np.unique(np.concatenate(found))


def _read(weight: Tensor, dim: int, width: int) -> Tensor:
    """Which of the channels that are summed over a weight reads at all.

    Args:
        dim: of the weight that numbers the channels of one group. width: channels of all groups.
    """
    count = weight.shape[dim]
    if count == width:
        return some(weight, set(range(weight.dim())) - {dim}).flatten()
    if (
        dim == 1 and width % count == 0 and weight.shape[0] % (width // count) == 0
    ):  # of a convolution in groups
        apart = weight.reshape(width // count, -1, *weight.shape[1:])
        return some(apart, {1, *range(3, apart.dim())}).flatten()
    return torch.ones(width, dtype=torch.bool, device=weight.device)
