"""shrink_module(model, kept, edits) -> a physically smaller module of the same class.

The small model is a deep copy in which every tensor is replaced, while it is copied, by its slice; no full
tensor is ever copied, tied tensors stay tied, and the original is only read. Then the numbers that torch's
own layers keep beside their tensors are set from the tensors' new shapes, and the `Edit`s of the plan are
made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.cut.weight_hooks import recompute
from surgeon.errors import PlanError
from surgeon.graph.copying.model_copy import copied_with
from surgeon.graph.module_tree import named_modules
from surgeon.graph.tensors import copied_tensor, like, named_tensors
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit
from surgeon.mend.torch_layers import refresh

Kept = Mapping[str, Mapping[int, list[int]]]


def shrink_module(
    model: nn.Module, kept: Kept, edits: Iterable[Edit] = (), slicer: Slicer | None = None
) -> nn.Module:
    """Copy `model` with every tensor in `kept` sliced.

    Args:
        kept: {tensor name: {dim: indices}}.
        edits: numbers to change in the copy.
        slicer: makes the slices.

    Raises:
        PlanError: a name or index does not fit the model.
        CopyError: the copy would hold a part of the original.
        MendError: an edit does not fit the model's code.
    """
    slicer = slicer or Slicer()
    memo: dict[int, Any] = {key: slicer(tensor, cut) for key, (tensor, cut) in find_cuts(model, kept).items()}
    small = copied_with(model, memo)
    for path, module in named_modules(small):
        recompute(module)
        refresh(module, path)
    for edit in edits:
        apply_edit(small, edit)
    return small


def find_cuts(model: nn.Module, kept: Kept) -> dict[int, tuple[Tensor, dict[int, list[int]]]]:
    """{id of a tensor: (the tensor, its kept indices by dim)}, for all tensors of a model; a tied one has
    those of all its names.

    Raises:
        PlanError: names do not fit the model, or a tied tensor is cut in two ways.
    """
    found: dict[int, tuple[Tensor, dict[int, list[int]]]] = {}
    names = set()
    for name, tensor in named_tensors(model):
        names.add(name)
        _, cut = found.setdefault(id(tensor), (tensor, {}))
        for dim, index in kept.get(name, {}).items():
            known = cut.setdefault(dim, index)
            if known is not index and list(known) != list(index):
                raise PlanError(
                    "tied tensors are cut in different ways", where=name, fix="make the plan anew"
                )
    missing = set(kept) - names
    if missing:
        raise PlanError(
            f"the model has no tensor '{min(missing)}'",
            fix="apply the plan to the model that it was made for",
        )
    return found


def exact_slice(data: Tensor, cut: Mapping[int, Tensor]) -> Tensor:
    """The entries at these indices of each dim, in a tensor of its own."""
    for dim, rows in cut.items():
        data = data.index_select(dim, rows.to(data.device))
    return data if cut else data.clone()


def rough_slice(data: Tensor, cut: Mapping[int, Tensor]) -> Tensor:
    """A tensor of the shape that the exact slice has, with any of the values: faster, as what is cut has no order."""
    if not cut or not data.is_floating_point() or not data.is_contiguous():  # indices must be those that stay
        return exact_slice(data, cut)
    shape = [len(cut[dim]) if dim in cut else size for dim, size in enumerate(data.shape)]
    return data.view(-1)[: math.prod(shape)].view(shape).clone()


class Slicer:
    """Slices tensors; index lists that several tensors share are checked and converted once.

    Args:
        take: (tensor, indices by dim) -> the slice.
    """

    def __init__(self, take: Callable[[Tensor, Mapping[int, Tensor]], Tensor] = exact_slice) -> None:
        self._known: dict[int, tuple[list[int], Tensor, int]] = {}
        self._take = take

    def __call__(self, tensor: Tensor, cut: Mapping[int, list[int]]) -> Tensor:
        """A new tensor (parameter, if it was one) with only the kept indices along each dim, in the same order in
        memory (channels last, say); its gradient follows.
        """
        if not cut:
            return copied_tensor(tensor)
        found: dict[int, Tensor] = {}
        for dim, index in cut.items():
            found[dim], needed = self._index(index)
            if dim >= tensor.dim() or not 0 < needed <= tensor.shape[dim]:
                raise _unfit(dim, tensor)
        new = like(tensor, _in_order_of(tensor, self._take(tensor.detach(), found)))
        if tensor.is_leaf and tensor.grad is not None:
            new.grad = self(tensor.grad, cut)
        return new

    def _index(self, index: list[int]) -> tuple[Tensor, int]:
        """The indices as a tensor, and the size that a dim must have at least; 0 if they are no indices."""
        if id(index) not in self._known:
            rows = torch.tensor(index, device="cpu")
            sound = bool(index) and index[0] >= 0 and bool((rows[1:] > rows[:-1]).all())
            self._known[id(index)] = index, rows, index[-1] + 1 if sound else 0
        _, rows, needed = self._known[id(index)]
        return rows, needed


def _in_order_of(tensor: Tensor, data: Tensor) -> Tensor:
    """A slice of a tensor whose dims follow each other in memory as those of the tensor do."""
    if tensor.layout is not torch.strided or data.dim() < 2 or _in_usual_order(tensor):
        return data
    window = tensor.detach()
    for dim, size in enumerate(data.shape):
        window = window.narrow(dim, 0, size)
    return torch.empty_like(window, memory_format=torch.preserve_format).copy_(data)


def _in_usual_order(tensor: Tensor) -> bool:
    """Whether the last dim follows first in memory, the first one last; dims of size 1 count, as kernels ask for them."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != step:
            return False
        step *= size
    return True


def _unfit(dim: int, tensor: Tensor) -> PlanError:
    return PlanError(
        f"kept indices of dim {dim} do not fit a tensor of shape {tuple(tensor.shape)}",
        why="they must be ascending, not empty, and within the dim",
        fix="make the plan anew with surgery.plan(...)",
    )
