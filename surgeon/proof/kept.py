"""What a plan keeps of the original's tensors, and whether the small model's are those."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.utils._pytree
from torch import Tensor, nn

from surgeon.cut.plan import Plan
from surgeon.errors import ProofError
from surgeon.graph.tensors import named_tensors


def kept_of(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the plan keeps of tensors, by their names in the model; it names a tied tensor once."""
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        tied = first.setdefault(id(tensor), name)
        if name not in tensors:
            continue
        part = tensors[name].detach()
        for dim, kept in plan.kept.get(name, plan.kept.get(tied, {})).items():
            part = part.index_select(dim, torch.as_tensor(kept, device=part.device))
        found[name] = part
    return found


def check_tensors(model: nn.Module, small: nn.Module, plan: Plan, read: Set[str]) -> None:
    """Every tensor of the small model is the original's at the kept indices, bit for bit: runs would not see
    dead channels.

    Plain attributes that no run reads are left out: each run makes them anew (weights that hooks compute, kept
    activations).
    """
    stored = {
        n
        for values in (model.named_parameters, model.named_buffers)
        for n, _ in values(remove_duplicate=False)
    }
    compared = {n: t for n, t in named_tensors(model) if n in stored or n in read}
    cut = dict(named_tensors(small))
    for name, want in kept_of(model, plan, compared).items():
        got = cut.get(name)
        if got is None or got.shape != want.shape or not torch.equal(got.detach(), want):
            raise ProofError(
                "a tensor of the small model is not the original's at the kept indices",
                where=name,
                why="the small model was changed since the cut, or comes from other weights or another plan",
                fix="prove right after plan.apply(model), before training, recovery or fusion",
            )


def check_has_values(*models: nn.Module) -> None:
    """Refuse models on the meta device.

    Raises:
        ProofError: a tensor has no values.
    """
    for model in models:
        name = next((name for name, tensor in named_tensors(model) if tensor.is_meta), None)
        if name is not None:
            raise ProofError(
                "a model without values cannot be compared with another one",
                where=f"{name} is on the meta device",
                why="a proof holds numbers against numbers",
                fix="plan on the meta device with surgeon.inspect(model, ...).plan(...), then plan.apply(...) and verify(...) "
                "with the weights",
            )
