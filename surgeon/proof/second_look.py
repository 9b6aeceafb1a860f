"""What one run of a proof cannot show: tensors of zeros, channels that carry nothing, tensors that reach nothing.

A weight of zeros (a fresh LoRA, the zero convolution of a ControlNet, a scale that starts at 0) gives the same
result whichever channels it reads. `filled` puts random numbers in its place for a second run; what still
carries nothing there is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn

from surgeon.graph.arguments import arguments
from surgeon.graph.graph import Graph
from surgeon.graph.tensors import named_tensors
from surgeon.ops import masks
from surgeon.ops.masked_op import wide
from surgeon.ops.masks import Mask
from surgeon.ops.table import Family, Trait, family, has, op_name, product


def filled(model: nn.Module, cut: Collection[str]) -> dict[str, Tensor]:
    """Tensors of the model with random numbers in place of zeros that would hide what they are multiplied with.

    Filled are parameters that are zero throughout and columns of zeros (along any dim but the first); buffers
    only if they are cut: of others nothing says that they are numbers to compute with. Rows of zeros stay: they
    give channels that are zero, which are counted.

    Args:
        cut: the names of the tensors that the plan cuts.

    Returns:
        In float64, by every name of the tensor; {} if there is nothing to fill.
    """
    generator = torch.Generator().manual_seed(1)
    done: dict[int, Tensor | None] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        if not tensor.is_floating_point() or not (isinstance(tensor, nn.Parameter) or name in cut):
            continue
        if id(tensor) not in done:
            empty = _empty(tensor.detach())
            done[id(tensor)] = _drawn(wide(tensor.detach()), empty, generator) if bool(empty.any()) else None
        new = done[id(tensor)]
        if new is not None:
            found[name] = new
    return found


def hides(graph: Graph, names: Collection[str]) -> bool:
    """Whether any of these tensors is more than added: zeros that are added hide nothing, as what is absent of
    them is absent of the sum.
    """
    return any(node.target in names and not _only_added(node) for node in graph.fx.find_nodes(op="get_attr"))


def _only_added(node: fx.Node) -> bool:
    for user in node.users:
        if user.op != "call_function":
            continue
        name = op_name(user)
        places = {place for place, value in arguments(user).items() if value is node}
        if family(name) is Family.MOVEMENT and _only_added(user):
            continue
        multiplied = product(user)
        added = {operand.name for operand in multiplied.added} if multiplied is not None else set()
        if not (places <= added | {"bias", "running_mean"} or has(name, Trait.ADDS)):
            return False
    return True


def _empty(tensor: Tensor) -> Tensor:
    """Where a tensor holds nothing: throughout, or in columns."""
    zeros, count = tensor.numel() - int(torch.count_nonzero(tensor)), tensor.numel()
    if zeros == count or zeros < min((count // size for size in tensor.shape[1:]), default=count):
        whole = bool(zeros) and zeros == count  # fewer zeros are no column
        return torch.full((1,) * tensor.dim(), whole, device=tensor.device).expand(tensor.shape)
    zero = tensor == 0
    rows = zero.flatten(1).all(1).reshape(-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() > 1 else zero
    result = torch.zeros_like(zero)
    for dim in range(1, tensor.dim()):
        result |= _all(zero, (d for d in range(tensor.dim()) if d != dim))
    return result & ~rows


def _all(flags: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in dims:
        flags = flags.all(dim, keepdim=True)
    return flags


def _drawn(tensor: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of the size of a usual initialisation; those of vectors positive, as variances and scales are."""
    drawn = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if tensor.dim() > 1:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        drawn = drawn * signs / max(1, tensor[0].numel()) ** 0.5
    return torch.where(empty, drawn.to(tensor.device), tensor)


def carries_nothing(data: Tensor, mask: Mask) -> Tensor:
    """Which of the present channels show nothing of themselves: zero throughout, no finite number, or one number
    throughout that another channel has as well.
    """
    others = [dim for dim in range(data.dim()) if not masks.varies(mask, [dim])]
    if data.is_complex():
        data = torch.view_as_real(data).abs().sum(-1)
    low = data.amin(others, keepdim=True) if others else data
    high = data.amax(others, keepdim=True) if others else data
    present = masks.full(mask, low.shape)
    silent = present & ~(torch.isfinite(low) & torch.isfinite(high)) & ~_any_finite(data, others)
    uniform = present & (low == high)
    numbers, counts = low[uniform].unique(return_counts=True)
    repeated = torch.isin(low, numbers[(counts > 1) | (numbers == 0)])
    return silent | (uniform & repeated)


def _any_finite(data: Tensor, dims: Iterable[int]) -> Tensor:
    return ~_all(~torch.isfinite(data), dims)


def empty_along(data: Tensor, mask: Mask, dim: int) -> Tensor:
    """Which of the present entries of a dim are zero throughout."""
    others = [d for d in range(data.dim()) if d != dim]
    zero = ~(data.any(others, keepdim=True) if others else data.bool())
    return zero & masks.full(masks.any_along(mask, others), zero.shape)


def shown(graph: Graph, compared: Collection[fx.Node]) -> set[str]:
    """The names of the tensors that reach an output or a value that was compared."""
    todo = [*(node for _, node in graph.outputs), *compared]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return {str(node.target) for node in seen if node.op == "get_attr"}
