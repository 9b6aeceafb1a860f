"""Constants that leave with their channels, taken over by the readers' biases, or by the running means behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from surgeon.criteria.data.consumers import normalises, only_reader
from surgeon.cut.plan import Plan
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import named_tensors
from surgeon.masks.dependence import added_to, outputs_of
from surgeon.masks.signals import Constants
from surgeon.ops.ids import DimIds
from surgeon.selection.cost import ShapeModel


@dataclasses.dataclass(frozen=True)
class Fold:
    """What a tensor takes over.

    Attributes:
        tensor: its name.
        channels: how many constants left.
        shift: what is added to it, for all entries of the original.
    """

    tensor: str
    channels: int
    shift: Tensor


def taker(graph: Graph, node: fx.Node) -> tuple[str, int] | None:
    """The tensor that can move an op's results by a constant each, and the sign; None if there is none.

    A bias that only this op reads, or the running mean of the batch norm that alone reads the result (in training mode that
    norm takes the constant away by itself).
    """
    bias = added_to(node)
    if bias and bias[0] is not None:
        plain = arguments(node).get("beta", 1) == 1
        return (str(bias[0].target), 1) if plain and _own(graph, bias[0], node) else None
    reader = only_reader(node)
    if reader is None or not normalises(reader, node):
        return None
    mean = arguments(reader).get("running_mean")
    return (str(mean.target), -1) if isinstance(mean, fx.Node) and _own(graph, mean, reader) else None


def _own(graph: Graph, item: object, node: fx.Node) -> bool:
    """Whether an operand is a vector of the model's that nothing else reads."""
    if not isinstance(item, fx.Node) or item.op != "get_attr" or item.target not in graph.owned:
        return False
    readers = {user for same in graph.fx.find_nodes(op="get_attr", target=item.target) for user in same.users}
    return readers == {node} and graph.tensors[str(item.target)].dim() == 1


def folds(graph: Graph, shapes: ShapeModel, constants: Sequence[Constants], choice: DimIds) -> list[Fold]:
    """What biases take over from the channels that a choice removes."""
    found = []
    for each in constants:
        leaving = shapes.leaves(each.ids, choice) & (each.numbers != 0).cpu().numpy()
        target = taker(graph, each.node)
        if leaving.any() and target is not None:
            found.append(Fold(target[0], int(leaving.sum()), target[1] * _vector(each, leaving)))
    return found


def can_take(graph: Graph, constants: Constants) -> bool:
    """Whether something can take over what a sum's constants add."""
    target = taker(graph, constants.node)
    if target is None:
        return False
    every = (constants.numbers != 0).cpu().numpy()
    return graph.tensors[target[0]].shape == _vector(constants, every).shape


def _vector(constants: Constants, chosen: DimIds) -> Tensor:
    """What channels add, one number for each output of the op."""
    result = constants.added(chosen)
    own = outputs_of(constants.node, constants.value)
    for dim in range(result.dim()):
        result = result if dim in own else result.narrow(dim, 0, 1)
    return result.flatten()


def exact(small: nn.Module, plan: Plan, found: Sequence[Fold]) -> dict[str, Tensor]:
    """The small model's tensors with what they take over, in float64, by name."""
    tensors: Mapping[str, Tensor] = dict(named_tensors(small))
    result: dict[str, Tensor] = {}
    for each in found:
        tensor = result.get(each.tensor, tensors[each.tensor].detach().double())
        kept = plan.kept.get(each.tensor, {}).get(0)
        shift = each.shift if kept is None else each.shift[list(kept)]
        result[each.tensor] = tensor + shift.to(tensor.device)
    return result


@torch.no_grad()
def take_over(small: nn.Module, numbers: Mapping[str, Tensor]) -> None:
    """Set tensors of the small model, rounded to their dtype."""
    tensors = dict(named_tensors(small))
    for name, tensor in numbers.items():
        tensors[name].copy_(tensor.to(tensors[name].dtype))
