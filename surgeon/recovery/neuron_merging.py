"""Folding, for when there are no data: what a removed channel gave goes to the kept channel that is most like
it.

Two channels whose filters (with bias, through the batch norm behind) are f_r = c f_p + rest give about x_r =
c x_p, also behind a ReLU if c > 0. So the weights that read r are added, times c, to those that read p. (Kim
et al., Neuron Merging, NeurIPS 2020.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.graph.graph import Graph
from surgeon.ops.ids import DimIds
from surgeon.recovery.inverse_steps import norm_behind
from surgeon.recovery.kept_entries import KeptEntries
from surgeon.recovery.layers import Layer
from surgeon.recovery.linear.equations import Equations

_LIKE = 0.3  # cosine below which a channel is like none


@dataclasses.dataclass(frozen=True)
class Filters:
    """The rows with which one layer of the original makes channels: [channels, inputs + 1], and the atoms
    they leave with.
    """

    atoms: DimIds
    rows: Tensor


@torch.no_grad()
def fold(
    layers: Sequence[Layer], kept_entries: KeptEntries, big: Graph, small: Mapping[str, Tensor]
) -> list[str]:
    """Fold what left into the small model's weights, as cut; the names of the layers that took something
    up.
    """
    made = [_filters(layer, kept_entries, big) for layer in layers]
    done = []
    for layer in layers:
        name = layer.weight.name
        dim = _inputs(layer, big.tensors[name])
        slot = kept_entries.propagation.slots.get((name, dim)) if dim is not None else None
        if dim is None or slot is None:
            continue
        gone = kept_entries.shapes.leaves(slot, kept_entries.choice)
        atoms = kept_entries.shapes.solution.atoms(slot)[0]
        known = [f for f in made if f is not None and np.isin(atoms, f.atoms).all()]
        if not gone.any() or not known or len(np.unique(atoms)) != len(atoms):
            continue
        rows = torch.cat([f.rows[torch.from_numpy(_find(f.atoms, atoms))] for f in known], 1)
        share = _shares(rows, torch.from_numpy(gone))
        if not bool(share.any()):
            continue
        whole = big.tensors[name].detach().double()
        for other in set(range(whole.dim())) - {dim}:
            whole = kept_entries.slot(name, whole, other)
        more = torch.tensordot(
            share, whole.index_select(dim, torch.from_numpy(np.flatnonzero(gone))), ([0], [dim])
        )
        small[name].add_(more.movedim(0, dim).to(small[name].dtype))
        done.append(layer.name)
    return done


def _filters(layer: Layer, kept_entries: KeptEntries, big: Graph) -> Filters | None:
    """What a layer of the original makes its channels with."""
    name = layer.weight.name
    dim = _outputs(layer, big.tensors[name])
    slot = kept_entries.propagation.slots.get((name, dim)) if dim is not None else None
    if slot is None:
        return None
    matrix = Equations(layer, big.tensors[name]).matrix(big.tensors[name]).double()  # [1, inputs, channels]
    rows = matrix[0].T
    constant = torch.zeros(len(rows), dtype=torch.float64)
    if layer.bias and not layer.norm:
        constant = big.tensors[layer.bias].detach().double()
    affine = norm_behind(layer.twin, big)
    if affine is not None:
        rows, constant = rows * affine[0][:, None], constant * affine[0] + affine[1]
    return Filters(kept_entries.shapes.solution.atoms(slot)[0], torch.cat([rows, constant[:, None]], 1))


def _outputs(layer: Layer, weight: Tensor) -> int | None:
    """The dim of the stored weight that numbers outputs; None for groups and batches of products."""
    return _dim(layer, weight, 1)


def _inputs(layer: Layer, weight: Tensor) -> int | None:
    return _dim(layer, weight, 0)


def _dim(layer: Layer, weight: Tensor, which: int) -> int | None:
    equations = Equations(layer, weight)
    if equations.batched or (equations.layout is not None and equations.layout.groups > 1):
        return None
    if equations.layout is not None:
        return which if equations.layout.transposed else 1 - which
    # a matrix: see which stored dim the turns bring to rows (inputs) or columns (outputs)
    probe = equations.matrix(torch.arange(weight.numel()).reshape(weight.shape))[0]
    step = probe[1, 0] - probe[0, 0] if which == 0 else probe[0, 1] - probe[0, 0]
    return int(step == 1)


def _find(known: DimIds, wanted: DimIds) -> DimIds:
    order = np.argsort(known)
    found: DimIds = order[np.searchsorted(known[order], wanted)]
    return found


def _shares(rows: Tensor, gone: Tensor) -> Tensor:
    """[removed, kept]: how much of each removed channel goes to each kept one; one each, or none."""
    left, kept = rows[gone], rows[~gone]
    length = kept.norm(dim=1).clamp(min=1e-30)
    like = left @ kept.T / length / left.norm(dim=1, keepdim=True).clamp(min=1e-30)
    best, place = like.max(1)
    share = (left * kept[place]).sum(1) / length[place].square()
    found = torch.zeros(len(left), len(kept), dtype=rows.dtype)
    found[torch.arange(len(left)), place] = torch.where(best > _LIKE, share, 0.0)
    return found
