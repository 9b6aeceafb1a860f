"""What capture must know of ATen's aliasing: which ops write, which return views, and the inverse of each
view.

`scatter` answers: if the view `op(base, *rest)` now holds `child`, which functional op gives the new base?
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from surgeon.graph.graph import Spec
from surgeon.graph.opaque_ops import as_written

aten = torch.ops.aten
getitem = operator.getitem


@cache
def _write_positions(func: Any) -> tuple[tuple[int, str, bool], ...]:
    found = []
    for position, arg in enumerate(func._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            found.append((position, arg.name, bool(arg.kwarg_only)))
    return tuple(found)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that this call writes to."""
    found = []
    for position, name, _ in _write_positions(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(value, Tensor):
            found.append(value)
    return found


def writes(func: Any) -> bool:
    """Whether the op writes to one of its arguments."""
    return bool(_write_positions(func))


@cache
def is_view(func: Any) -> bool:
    """Whether an output of the op aliases its first argument without writing to it."""
    if _write_positions(func):
        return False
    return any(ret.alias_info is not None for ret in func._schema.returns)


_RENAMED = {
    "_index_put_impl_": aten.index_put.default,
    "transpose_": aten.transpose.int,
    "normal_": aten.normal_functional.default,
    "uniform_": aten.uniform.default,
    "exponential_": aten.exponential.default,
}


@cache
def functional(func: Any) -> Any:
    """The op that returns what an in-place op writes: `add_.Tensor` -> `add.Tensor`, `pow_.Scalar` ->
    `pow.Tensor_Scalar`.

    None if there is none.
    """
    name = func._schema.name.split("::")[1]
    namespace = getattr(torch.ops, func._schema.name.split("::")[0])
    if name in _RENAMED:
        return _RENAMED[name]
    known = name.endswith("_") and hasattr(namespace, name.removesuffix("_"))
    packet = getattr(namespace, name.removesuffix("_")) if known else None
    if packet is None:
        return None
    overloads = [
        getattr(packet, name) for name in sorted(packet.overloads(), key=lambda n: n != func._overloadname)
    ]
    return next((op for op in overloads if _takes(op)[: len(_takes(func))] == _takes(func)), None)


@cache
def without_out(func: Any) -> Any:
    """The op that returns what a form with an `out` argument writes: `add.out` -> `add.Tensor`. None if there is none."""
    places = _write_positions(func)
    if not all(by_name for _, _, by_name in places):
        return None
    packet = getattr(getattr(torch.ops, func._schema.name.split("::")[0]), func._schema.name.split("::")[1])
    written_to = {name for _, name, _ in places}
    rest = [argument for argument in _takes(func) if argument[0] not in written_to]
    found = (getattr(packet, name) for name in packet.overloads())
    return next((op for op in found if _takes(op) == rest and not writes(op)), None)


@cache
def whole(func: Any) -> Any:
    """An op that writes, as one that returns what it writes, whatever it is."""
    return as_written(func, tuple((place, name) for place, name, _ in _write_positions(func)))


@cache
def names(op: Any) -> frozenset[str]:
    """The names of an op's arguments."""
    return frozenset(argument.name for argument in op._schema.arguments)


def _takes(op: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


def left_out(func: Any, pure: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments that the call left out because `func` has a default, where `pure` has none (`bernoulli_` has
    p = 0.5).
    """
    needed = {a.name for a in pure._schema.arguments if not a.has_default_value()}
    rest = func._schema.arguments[len(args) :]
    return {
        a.name: a.default_value
        for a in rest
        if a.name in needed and a.name not in kwargs and a.has_default_value()
    }


def overlap(target: Tensor, source: Tensor) -> bool:
    """Whether a copy writes to some places that it reads for others: what it gives hangs on the order in
    which it goes.
    """
    if (
        target.is_meta
        or not target.numel()
        or target.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
    ):
        return False
    if (target.storage_offset(), target.shape, target.stride()) == (
        source.storage_offset(),
        source.shape,
        source.stride(),
    ):
        return False
    places = torch.arange(max(map(_end, (target, source))))
    here, there = (places.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (target, source))
    return bool(torch.isin(here.reshape(-1), there.reshape(-1)).any())


def _end(tensor: Tensor) -> int:
    """The place in its storage behind a tensor's last entry."""
    return (
        int(tensor.storage_offset())
        + 1
        + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    )


def keeps_layout(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is an in-place `as_strided_` that leaves every entry in its place (convolutions do this to
    1x1 maps).
    """
    if (
        func is not aten.as_strided_.default
        or len(args) < 3
        or (len(args) > 3 and args[3] not in (None, args[0].storage_offset()))
    ):
        return False
    x, size, stride = args[:3]
    return list(x.shape) == list(size) and all(
        a == b for a, b, n in zip(x.stride(), stride, size, strict=True) if n > 1
    )


def scatter(
    op: Any, base: fx.Node, child: fx.Node, rest: tuple[Any, ...], index: int | None, spec: Spec
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """(functional op, args, kwargs) that puts `child` back into `base`, or None if the view has no known
    inverse.
    """
    shape, ndim = list(spec.shape), len(spec.shape)
    dim = int(rest[0]) % ndim if rest and isinstance(rest[0], int) and ndim else 0
    if op in (aten.slice.Tensor,):
        return aten.slice_scatter.default, (base, child, *rest), {}
    if op is aten.select.int:
        return aten.select_scatter.default, (base, child, *rest), {}
    if op is aten.diagonal.default:
        return aten.diagonal_scatter.default, (base, child, *rest), {}
    if op in (aten.detach.default, aten.alias.default):
        return aten.alias.default, (child,), {}
    if op in (
        aten.view.default,
        aten._unsafe_view.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.unsqueeze.default,
    ):
        return aten.view.default, (child, shape), {}
    if op in (aten.squeeze.dims, aten._reshape_alias.default):
        return aten.view.default, (child, shape), {}
    if op is aten.t.default:
        return aten.t.default, (child,), {}
    if op is aten.transpose.int:
        return aten.transpose.int, (child, *rest), {}
    if op is aten.permute.default:
        order = [d % ndim for d in rest[0]]
        return aten.permute.default, (child, [order.index(d) for d in range(ndim)]), {}
    if op in (aten.split.Tensor, aten.split_with_sizes.default) and index is not None:
        dim = int(rest[1]) % ndim if len(rest) > 1 else 0
        sizes = rest[0] if not isinstance(rest[0], int) else [rest[0]] * index
        start = sum(sizes[:index])
        length = child.meta["spec"].shape[dim]
        return aten.slice_scatter.default, (base, child, dim, start, start + length), {}
    if op is aten.unbind.int and index is not None:
        return aten.select_scatter.default, (base, child, dim, index), {}
    return None
