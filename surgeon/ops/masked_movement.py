"""What ops that only move entries do with presence: the same move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgeon.ops import masks
from surgeon.ops.masked_op import Op
from surgeon.ops.table import Family, family, op_name

_TWO = {"slice_scatter", "select_scatter", "diagonal_scatter"}


def movement(call: Op) -> Any:
    """Presence is moved as the entries are; what is nobody's is present, unless all that is written to its
    row is absent.
    """
    if call.name == "as_strided" and "layout" in call.node.meta:
        return _strided(call)
    result = call.run(call.data)
    if not call.masked:
        return [(r, ()) for r in result] if isinstance(result, list | tuple) else (result, ())
    exact = call.name not in ("permute", "t", "transpose", "unsqueeze", "expand", "slice", "select")
    if call.name in ("cat", "concat", "stack"):  # presence as one tensor per operand
        parts = {n: masks.full(call.mask(n), call.data(n).shape) for n in call["tensors"]}
        return result, masks.tidy([masks.compress(call.run(lambda item: parts.get(item, item)), exact=True)])
    first = call["self"]
    if call.name == "slice_scatter" and not call.mask(first) and _is_nobodys(first):
        written = call.mask(call["src"])
        if not masks.varies(written, [call["dim"] % result.dim()]):
            return result, written
    if call.name in _TWO:
        both = call.run(
            lambda item: (
                masks.full(call.mask(item), call.data(item).shape) if isinstance(item, fx.Node) else item
            )
        )
        return result, masks.tidy([masks.compress(both, exact=True)])
    if call.name == "constant_pad_nd":
        return result, masks.tidy(_padded(factor, call["pad"]) for factor in call.mask(first))
    shape = call.data(first).shape

    def op(factor: Tensor) -> Any:
        return call.on(first, factor)

    if isinstance(result, list | tuple):
        found = [[masks.compress(part, exact=True) for part in op(f.expand(shape))] for f in call.mask(first)]
        return [(r, masks.tidy(f[i] for f in found)) for i, r in enumerate(result)]
    return result, masks.moved(call.mask(first), shape, op, exact)


def _strided(call: Op) -> Any:
    """What is read lies in memory as it did in the recorded run."""
    x, size, stride = call["self"], call["size"], call["stride"]
    strides, offset = call.node.meta["layout"]
    start = 0 if call["storage_offset"] is None else call["storage_offset"] - offset

    def op(tensor: Tensor) -> Tensor:
        laid = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
        return laid.as_strided(size, stride, start)

    return op(call.data(x)), masks.moved(call.mask(x), call.data(x).shape, op, exact=True)


def _padded(factor: Tensor, pads: list[int]) -> Tensor:
    """What padding adds is nobody's: present, unless it lies in a row that is absent or meets something
    absent later.
    """
    own = list(pads)
    for i in range(len(own) // 2):
        if factor.shape[factor.dim() - 1 - i] == 1:
            own[2 * i] = own[2 * i + 1] = 0
    padded: Tensor = torch.ops.aten.constant_pad_nd.default(factor, own, 1)
    return padded


def _is_nobodys(node: fx.Node) -> bool:
    """Whether a tensor was made of a constant: a row of it is absent if what is written to it is."""
    if node.op != "call_function":
        return False
    kind = family(op_name(node))
    return kind is Family.FACTORY or (kind is Family.MOVEMENT and all(map(_is_nobodys, node.all_input_nodes)))
