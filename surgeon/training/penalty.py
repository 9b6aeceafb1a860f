"""Regularizer: a penalty on units, as an object for any loop; the base of all kinds.

A unit's weights are the slices of all slots of its group, at the indices that leave with it: filters, biases,
scales of norms, and the columns of every layer that reads it. An entry counts once for each slot that it lies
in: a weight between two groups belongs to a unit of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from surgeon.coupling.groups import Group, Member
from surgeon.cut.inspected import Inspected
from surgeon.errors import InputError


class Regularizer(nn.Module):
    """A penalty on the weights of the model of a surgery, for your own loop. Base of the kinds.

        loss = loss + reg()  # a differentiable number
        optimizer.step()
        reg.advance()  # counts the step, which only "growing" needs

    or, between backward() and optimizer.step(), `reg.step()`: it adds the penalty's gradient in place, and
    advances.

    The surgery's model must be the very module that trains, or that DDP wraps. Its state (`state_dict`) is
    needed to resume.

    Attributes:
        groups: what it covers. without: names of groups that this kind has nothing to hold on to in.
        group_options: for the optimizer's group of the regularizer's own parameters, if it has any.
    """

    group_options: Mapping[str, Any] = {}

    def __init__(
        self, surgery: Inspected, strength: float, groups: list[Group], without: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.strength, self.groups, self.without = strength, groups, tuple(without)
        self._tensors = {name: t for name, t in surgery.graph.tensors.items() if isinstance(t, nn.Parameter)}
        self._places: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self) -> Tensor:
        """The penalty, times the strength."""
        raise NotImplementedError

    def step(self) -> None:
        """Add the gradient of the penalty to `.grad` of the parameters, and advance."""
        mine = [p for p in self.parameters() if p.requires_grad]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in mine:  # no DDP averages these
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        wanted = mine + [self._tensors[name] for name in self._names() if self._tensors[name].requires_grad]
        if not wanted:
            raise InputError(
                "no weight that the regularizer covers takes gradients", fix="model.requires_grad_(True)"
            )
        with torch.enable_grad():
            found = torch.autograd.grad(self(), wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self.advance()

    def advance(self) -> None:
        """Count a step of the optimizer."""

    def covers(self, model: nn.Module) -> bool:
        """Whether its weights are this model's."""
        own = {id(parameter) for parameter in model.parameters()}
        return any(id(self._tensors[name]) in own for name in self._names())

    def _names(self) -> list[str]:
        return sorted({m.tensor for group in self.groups for m in group.members if m.tensor in self._tensors})

    def _by_unit(
        self, group: Group, of: Callable[[Tensor], Tensor], members: Iterable[Member] | None = None
    ) -> Tensor:
        """[units]: `of` each entry, summed over what leaves with each unit."""
        total: Tensor | None = None
        for member in group.members if members is None else members:
            tensor = self._tensors.get(member.tensor)
            if tensor is None or not tensor.is_floating_point():
                continue
            values = of(tensor if tensor.dtype == torch.float64 else tensor.float())
            values = (
                values.sum([d for d in range(values.dim()) if d != member.dim])
                if values.dim() > 1
                else values
            )
            index, unit = self._place(member, tensor.device)
            total = values.new_zeros(group.units) if total is None else total.to(values.device)
            total = total.index_add(0, unit, values[index])
        return torch.zeros(group.units) if total is None else total

    def _place(self, member: Member, device: torch.device) -> tuple[Tensor, Tensor]:
        key = id(member), device
        if key not in self._places:
            self._places[key] = (
                torch.as_tensor(member.index, device=device),
                torch.as_tensor(member.unit, device=device),
            )
        return self._places[key]

    def _sum(self, parts: list[Tensor]) -> Tensor:
        return torch.stack([part.sum().to(parts[0].device) for part in parts]).sum() * self.strength
