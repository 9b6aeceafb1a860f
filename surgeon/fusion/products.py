"""Folds of products: two layers in a row into one where that needs fewer MACs, and parallel convolutions into
one.

Parallel branches of the same input whose outputs are summed are one convolution (RepVGG, Ding et al. 2021):
the taps of the smaller kernel are added to those of the larger one that read the same entries; a batch norm
or the input itself counts as a 1x1 kernel on the diagonal. Zero padding is the same zeros for all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.fusion import affine, forward
from surgeon.fusion.fold import Fold, Foldable, set_module
from surgeon.fusion.owners import CONVS
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit

_aten = torch.ops.aten


def chains(site: Foldable) -> Iterator[Fold]:
    """linear-linear, conv-conv (the second 1x1): nothing in between, and fewer MACs as one layer."""
    for node in site.graph.fx.nodes:
        second = site.owners.layer(node)
        if second is None:
            continue
        linear = isinstance(second, nn.Linear)
        before = _source(node, linear)
        first = site.owners.layer(before)
        if (
            first is None
            or isinstance(first, nn.Linear) != linear
            or not (linear or (_pointwise(second) and _plain(first)))
        ):
            continue
        taps = first.weight[0, 0].numel() if not linear else 1
        into, middle, out = first.weight.shape[1], first.weight.shape[0], second.weight.shape[0]
        if taps * into * out >= taps * into * middle + middle * out:
            continue
        paths = before.meta["module"], node.meta["module"]

        def make(first: Any = first, second: Any = second, paths: tuple[str, str] = paths) -> None:
            (a, b), (c, d) = affine.weights_of(first), affine.weights_of(second)
            c = c.flatten(1)
            affine.assign(first, torch.tensordot(c, a, 1), c @ b + d, " + ".join(map(repr, paths)))
            set_module(site.model, paths[1], nn.Identity().eval())

        kind = "linear-linear" if linear else "conv-conv"
        yield Fold(kind, *paths, frozenset({before, node}), Counter(["product"]), make)


def _source(node: fx.Node, linear: bool) -> Any:
    """The run of a layer that this run of a layer alone reads, through nothing but the views of both."""
    value = node.args[(1 if node.target is _aten.addmm.default else 0) if linear else 0]
    while (
        linear
        and isinstance(value, fx.Node)
        and value.target in (_aten.view.default, _aten._unsafe_view.default)
    ):
        keeps = value.meta["spec"].shape[-1] == value.args[0].meta["spec"].shape[-1]  # type: ignore[union-attr]  # a view's input
        if not keeps or len(value.users) != 1 or not isinstance(value.args[0], fx.Node):
            return None
        value = value.args[0]
    return value if isinstance(value, fx.Node) and len(value.users) == 1 else None


def _pointwise(conv: Any) -> bool:
    sizes = (*conv.kernel_size, *conv.stride, conv.groups)
    return isinstance(conv, CONVS) and all(n == 1 for n in sizes) and not any(_padding(conv) or (1,))


def _plain(conv: Any) -> bool:
    return isinstance(conv, CONVS) and conv.groups == 1


def _padding(conv: Any) -> tuple[int, ...] | None:
    """The zero padding of a convolution, None if it is another kind of padding."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    return tuple(conv.padding)


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A branch as a convolution: `path` is its layer's, None for the input itself."""

    node: fx.Node
    data: fx.Node
    path: str | None
    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    layer: Any


def branches(site: Foldable) -> Iterator[Fold]:
    """parallel: the sum of two convolutions, or of one and a batch norm of the same input or that input
    itself.
    """
    for op in site.graph.fx.nodes:
        if op.target is not _aten.add.Tensor or op.kwargs or not all(isinstance(a, fx.Node) for a in op.args):
            continue
        owner = site.owners.code(op.meta["module"])
        for main, other in itertools.permutations(op.args[:2]):
            wide = _conv(site, main)
            added = None if wide is None else _conv(site, other) or _diagonal(site, other, wide)
            taps = None if wide is None or added is None or owner is None else _taps(wide, added)
            if wide is None or added is None or taps is None or set(wide.node.users) != {op}:
                continue
            if added.path is not None and set(_last(added).users) != {op}:
                continue
            leave = _leave(site, owner, op, wide, added)
            if leave is None:
                continue
            nodes = {op, op.meta["module"], wide.node} | ({added.node} if added.path is not None else set())
            removes = Counter(
                ["shift"] if added.path is None else ["shift", "product" if added.kernel else "norm"]
            )

            def make(
                wide: _Branch = wide, added: _Branch = added, taps: Any = taps, leave: Any = leave
            ) -> None:
                _merge(wide, added, taps)
                leave()

            gone = added.path if added.path is not None else f"add in '{op.meta['module']}'"
            yield Fold("parallel", str(wide.path), gone, frozenset(nodes), removes, make)
            break


def _conv(site: Foldable, node: Any) -> _Branch | None:
    layer = site.owners.layer(node)
    if not isinstance(layer, CONVS) or _padding(layer) is None:
        return None
    path = node.meta["module"]
    return _Branch(node, node.args[0], path, layer.kernel_size, layer.padding, layer.dilation, layer)  # type: ignore[arg-type]


def _diagonal(site: Foldable, node: Any, wide: _Branch) -> _Branch | None:
    """A batch norm of the convolution's input, or that input itself, as a 1x1 kernel on the diagonal."""
    layer = wide.layer
    if layer.in_channels != layer.out_channels or any(n != 1 for n in layer.stride):
        return None
    if node is wide.data:
        return _Branch(node, node, None, (), (), (), None)
    value = node if isinstance(node, fx.Node) else None
    if value is None or not value.args or not isinstance(value.args[0], fx.Node):
        return None
    norm = site.owners.norm(value.args[0])
    if norm is None or value.args[0].args[0] is not wide.data:
        return None
    return _Branch(value.args[0], wide.data, value.meta["module"], (), (), (), norm)


def _last(branch: _Branch) -> fx.Node:
    """The node of a branch's value."""
    if branch.kernel:
        return branch.node
    return next(user for user in branch.node.users if user.args[1] == 0)


def _taps(wide: _Branch, added: _Branch) -> list[list[int]] | None:
    """For each dim and each tap of the added kernel, the tap of the wide one that reads the same entry; None
    if some has none.
    """
    first, second = wide.layer, added.layer
    if added.kernel and (
        first.stride != second.stride or first.groups != second.groups or wide.data is not added.data
    ):
        return None
    if added.node.meta["spec"] != wide.node.meta["spec"] and added.kernel:
        return None
    found = []
    for dim, size in enumerate(wide.kernel):
        taps = added.kernel[dim] if added.kernel else 1
        padding, dilation = (added.padding[dim], added.dilation[dim]) if added.kernel else (0, 1)
        places = [wide.padding[dim] - padding + tap * dilation for tap in range(taps)]
        if any(place % wide.dilation[dim] or not 0 <= place // wide.dilation[dim] < size for place in places):
            return None
        found.append([place // wide.dilation[dim] for place in places])
    return found


def _leave(
    site: Foldable, owner: nn.Module, op: fx.Node, wide: _Branch, added: _Branch
) -> Callable[[], None] | None:
    """What puts the merged layer where one operand of the sum is and nothing where the other one is, and
    drops the sum.
    """
    path = op.meta["module"]
    for home, empty in ((wide.path, added.path), (added.path, wide.path)):
        edit = None if home is None else forward.branches_call(owner, path, (home, empty))
        if edit is not None:
            break
    else:
        return None

    def leave(edit: Edit = edit, home: str = str(home), empty: str | None = empty) -> None:
        set_module(site.model, home, wide.layer)
        if empty is not None:
            set_module(site.model, empty, nn.Identity().eval())
        apply_edit(site.model, edit)

    return leave


def _merge(wide: _Branch, added: _Branch, taps: list[list[int]]) -> None:
    weight, bias = affine.weights_of(wide.layer)
    extra, shift = _as_kernel(wide.layer, added)
    index: tuple[Any, ...] = tuple(torch.meshgrid(*[torch.tensor(t) for t in taps], indexing="ij"))
    weight = weight.clone()  # in float64 it is the layer's own
    weight[(slice(None), slice(None), *index)] += extra.reshape(*extra.shape[:2], *index[0].shape)
    affine.assign(wide.layer, weight, bias + shift, f"'{wide.path}' + '{added.path or 'its input'}'")


def _as_kernel(conv: Any, branch: _Branch) -> tuple[Tensor, Tensor]:
    """The branch's (weight, bias) in the layout of the convolution's weight, one tap where it has no
    kernel.
    """
    if branch.kernel:
        return affine.weights_of(branch.layer)
    width, inside = conv.out_channels, conv.weight.shape[1]
    ones, zeros = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    scale, shift = (ones, zeros) if branch.layer is None else affine.of_norm(branch.layer)
    kernel = torch.zeros(width, inside, *[1] * (conv.weight.ndim - 2), dtype=torch.float64)
    channel = torch.arange(width)
    kernel[channel, channel % inside] = scale.reshape(-1, *[1] * (conv.weight.ndim - 2))
    return kernel, shift
