"""`Selection`: what a choice keeps and costs, as plain data; the stage that cuts needs nothing else of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from surgeon.selection.cost import Choice, ShapeModel


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        macs: of one run on the example inputs, batch included.
        params: elements of its parameters, tied ones once.
        size: bytes of its parameters and stored buffers.
        memory: bytes of its activations that are alive at once, at most, for the example inputs.
    """

    macs: int
    params: int
    size: int
    memory: int

    @staticmethod
    def of(shapes: ShapeModel, choice: Choice) -> Cost:
        """The costs of what a choice leaves."""
        return Cost(shapes.macs(choice), shapes.params(choice), shapes.size(choice), shapes.memory(choice))


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """What stays.

    Attributes:
        choice: whether each id leaves.
        kept: {tensor name: {dim: kept indices, ascending}}; what keeps everything is left out.
        cost: of what stays.
        before: of the original.
        request: what was asked for, and what is to be said of it.
    """

    choice: Choice
    kept: Mapping[str, Mapping[int, list[int]]]
    cost: Cost
    before: Cost
    request: Mapping[str, Any]

    @staticmethod
    def of(shapes: ShapeModel, choice: Choice, before: Cost, request: Mapping[str, Any]) -> Selection:
        """The selection of a choice; `before` is what the original costs."""
        named = shapes.graph.named
        said = {**request, "outputs": list(named)} if named else dict(request)
        return Selection(choice, shapes.kept(choice), Cost.of(shapes, choice), before, said)
