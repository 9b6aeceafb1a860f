"""Numbers to take gradients of where there is no loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import InputError
from surgeon.graph.tensors import as_real, named, tensor_leaves


def output_energy(output: Any, names: Sequence[str] | None = None) -> Tensor:
    """Squared norm of all outputs of real or complex numbers, mean over samples (Aljundi et al., Memory Aware
    Synapses, 2018): a stand-in for a loss that needs no labels."""
    floats = _floats(output, names)
    return sum(
        (t.square().sum() / (t.shape[0] if t.dim() else 1) for t in floats), start=floats[0].new_zeros(())
    )


def output_probe(output: Any, names: Sequence[str] | None = None, *, generator: torch.Generator) -> Tensor:
    """All outputs of real or complex numbers times random signs: the squared gradient of this is, in the
    mean, how much the squared outputs change (Hutchinson's estimate of the diagonal of J^T J), for which no
    labels are needed."""
    floats = _floats(output, names)
    signs = [torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in floats]
    return sum(
        ((t * sign).sum() for t, sign in zip(floats, signs, strict=True)), start=floats[0].new_zeros(())
    )


def _floats(output: Any, names: Sequence[str] | None) -> list[Tensor]:
    given = [as_real(tensor) for _, tensor in named(list(tensor_leaves(output)), names)]
    found = [tensor for tensor in given if tensor.is_floating_point()]
    if not found:
        raise InputError(
            "the model has no float output to take gradients of",
            fix="pass loss=... that makes one number of it",
        )
    return found
