"""A reference of the tests' own: the original with zeros where a plan removes something."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

import surgeon
from surgeon.graph.tensors import named_tensors

M = TypeVar("M", bound=nn.Module)


def zeroed(model: M, plan: surgeon.Plan) -> M:
    """A copy that computes what the small model should, where nothing normalises over what leaves."""
    twin = copy.deepcopy(model)
    tensors = dict(named_tensors(twin))
    for name, dims in plan.kept.items():
        for dim, kept in dims.items():
            gone = sorted(set(range(tensors[name].shape[dim])) - set(kept))
            with torch.no_grad():
                tensors[name].index_fill_(dim, torch.tensor(gone), 0)
    return twin
