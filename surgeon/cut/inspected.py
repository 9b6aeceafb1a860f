"""`Inspected`: what later stages (training, sensitivity) read of an inspected model; `Surgery` is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn

from surgeon.coupling.groups import Group
from surgeon.coupling.links import Link
from surgeon.coupling.propagate import Propagation
from surgeon.coupling.solution import Solution
from surgeon.cut.plan import Plan
from surgeon.graph.graph import Graph
from surgeon.mend.config_model import ConfigModel
from surgeon.selection.cost import ShapeModel
from surgeon.selection.selection import Cost


class Inspected(Protocol):
    """A model with what was found of it, from which plans can be made.

    Attributes:
        model: the model, untouched.
    """

    model: nn.Module

    @property
    def graph(self) -> Graph: ...
    @property
    def runs(self) -> tuple[Graph, ...]: ...
    @property
    def shapes(self) -> ShapeModel: ...
    @property
    def cost(self) -> Cost: ...
    @property
    def config(self) -> ConfigModel | None: ...
    @property
    def groups(self) -> list[Group]: ...
    @property
    def links(self) -> list[Link]: ...
    @property
    def propagation(self) -> Propagation: ...
    @property
    def solution(self) -> Solution: ...
    @property
    def without_values(self) -> bool: ...
    def groups_without(
        self, ignore: Iterable[nn.Module | str], ignore_inputs: Iterable[nn.Module | str] = ()
    ) -> list[Group]: ...
    @property
    def plan(self) -> Callable[..., Plan]: ...
