"""frozen_share(analysis) -> how many output channels of the model's weights may not be removed, by reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from torch import fx

from surgeon.coupling.analysis import SIZE_OF_FROZEN, Analysis
from surgeon.coupling.explain import OUTPUT
from surgeon.graph.arguments import arguments
from surgeon.ops.ids import DimIds
from surgeon.ops.table import product


@dataclasses.dataclass(frozen=True)
class FrozenShare:
    """Output channels of all weights, those of the model's own outputs apart.

    Attributes:
        channels: how many there are.
        frozen: how many of them may not leave, by reason.
    """

    channels: int
    frozen: dict[str, int]

    @property
    def share(self) -> float:
        """Frozen output channels of all output channels, in [0, 1]."""
        return sum(self.frozen.values()) / max(self.channels, 1)

    @property
    def reason(self) -> str:
        """The reason that holds most of them, "" if nothing is frozen."""
        return max(self.frozen, key=lambda reason: self.frozen[reason], default="")


def frozen_share(analysis: Analysis) -> FrozenShare:
    """Count frozen output channels over every product of activations with weights, each weight once."""
    solution = analysis.solution
    held = np.zeros(len(solution.root), dtype=bool)
    for group in analysis.groups:
        held[group.sets] = True
    channels, frozen = 0, dict[str, int]()
    seen: set[bytes] = set()
    for ids in _outputs(analysis):
        key = ids.tobytes()
        if key in seen:
            continue
        seen.add(key)
        free = np.any([held[np.maximum(part, 0)] & (part >= 0) for part in solution.atoms(ids)], axis=0)
        stuck = ids[~free]
        reason = _reason(analysis, stuck) if stuck.size else ""
        if reason.startswith(OUTPUT):
            continue
        channels += ids.size
        if stuck.size:
            frozen[reason] = frozen.get(reason, 0) + int(stuck.size)
    return FrozenShare(channels, frozen)


def _reason(analysis: Analysis, ids: DimIds) -> str:
    if analysis.solution.frozen[analysis.solution.root[ids]].any():
        return analysis.solution.why(ids)[0]
    return SIZE_OF_FROZEN


def _outputs(analysis: Analysis) -> Iterator[DimIds]:
    """Ids of the output channels of each weight that some activation is multiplied with."""
    weights: set[fx.Node] = set()
    for run in analysis.runs:
        for node in run.fx.nodes:
            if node.op == "get_attr":
                weights.add(node)
            elif node.op == "call_function":
                inputs: Sequence[fx.Node] = node.all_input_nodes
                if inputs and all(n in weights for n in inputs):
                    weights.add(node)
                else:
                    yield from _output_of(analysis, node, weights)


def _output_of(analysis: Analysis, node: fx.Node, weights: set[fx.Node]) -> Iterator[DimIds]:
    products = product(node)
    if products is None:
        return
    for operand in products.operands:
        weight = arguments(node)[operand.name]
        axes = analysis.propagation.axes[weight] if weight in weights else {}
        if isinstance(axes, dict):
            yield from (axes[dim].ravel() for dim in products.own(operand) if dim in axes)
