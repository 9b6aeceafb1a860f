"""Reshapes: dims that merge are composed, dims that are cut become grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.ops.ids import Constraints, DimIds, ValueIds, varies


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Pairs (old dims, new dims) of a reshape with equal products, dims of size 1 left out; None if there are
    zero sizes.
    """
    left = [d for d, n in enumerate(old) if n != 1]
    right = [d for d, n in enumerate(new) if n != 1]
    if any(n == 0 for n in (*old, *new)):
        return None
    pairs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = old[left[i]], new[right[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(left[i])
                a *= old[left[i]]
            else:
                j += 1
                outs.append(right[j])
                b *= new[right[j]]
        pairs.append((ins, outs))
        i, j = i + 1, j + 1
    return pairs


def reshape(constraints: Constraints, axes: ValueIds, old: tuple[int, ...], new: tuple[int, ...]) -> ValueIds:
    """Tracks after `view(new)`: dims that merge are composed, dims that are cut become grids, the rest
    passes.
    """
    pairs = _segments(old, new)
    if pairs is None:
        constraints.freeze_all(axes, "a reshape of an empty tensor")
        return {}
    out: ValueIds = {}
    for ins, outs in pairs:
        here = [d for d in ins if d in axes]
        if not here:
            continue
        if len(ins) == 1:
            track: DimIds | None = axes[ins[0]]
        else:
            track = constraints.merge(axes, ins, old)
        assert track is not None
        moved = _regroup(track, pairs, old, new)
        if len(outs) == 1:
            out[outs[0]] = moved
        else:
            out.update(constraints.split(moved, outs))
    return out


def _regroup(
    track: DimIds, pairs: list[tuple[list[int], list[int]]], old: Sequence[int], new: Sequence[int]
) -> DimIds:
    """The same reshape on one compressed track: segments along which it varies are made full, the others stay
    1.
    """
    full, shape = list(track.shape), [1] * len(new)
    for ins, outs in pairs:
        if any(track.shape[d] != 1 for d in ins):
            for d in ins:
                full[d] = old[d]
            for d in outs:
                shape[d] = new[d]
    moved = np.broadcast_to(track, full).reshape(shape)
    for _, outs in pairs:  # compress dims that only repeat
        if len(outs) > 1:
            for d in outs:
                if moved.shape[d] > 1 and not varies(moved, d):
                    moved = np.take(moved, [0], axis=d)
    return moved
