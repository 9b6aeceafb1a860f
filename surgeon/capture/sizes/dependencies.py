"""SizeMode: which widths the model's own code computes from one another, seen while it runs.

A traced size (see `_sizes`) that comes back as a size of `view`, `reshape` or `unflatten` makes the new dim
*follow* the old one: code like `x.reshape(B, N, 3, heads, C // heads)` only works if the inner width keeps
the same share as C. So does one that comes back as a size of `zeros` and kin.
One that comes back as an end of a slice makes the entries before it follow: `x[:, : C //
8]` only takes what it took if those keep the same share.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.call_stack import user_line
from surgeon.capture.hollow.mode import HollowRun
from surgeon.capture.paths.decisions import note_left, note_length, note_parts
from surgeon.capture.sizes.traced_size import Follows, SizeNumber, TracedInt
from surgeon.capture.sizes.tracing import Sizes, inside_transform, rate_of_dropout
from surgeon.graph.graph import Read
from surgeon.graph.python_calls import PARTS, REPEATS, RESHAPES, SPLITS
from surgeon.ops.table import Family, family, op_name


@dataclasses.dataclass(frozen=True)
class Cut:
    """Entries `first` to `last` of a dim, so many as the code computed from another size."""

    dim: int
    first: int
    last: int
    source: Follows


class SizeMode(Sizes):
    """Hands out traced sizes and reports which dims of reshaped tensors, and which parts of sliced ones,
    follow which.

    Args:
        node_of: the graph node of a tensor, None if it is not part of the run.
        assign: told of `tensor.data = other`, which is no op.
        within: told the number of a product before it runs, and 0 after it.
        hollow: told of the tensors whose numbers leave torch.
    """

    def __init__(
        self,
        node_of: Callable[[Tensor], fx.Node | None],
        assign: Callable[[Tensor, Tensor], None],
        within: Callable[[int], None],
        hollow: HollowRun | None = None,
    ) -> None:
        super().__init__()
        self.node_of, self.assign, self.within, self.hollow = node_of, assign, within, hollow
        self.reads: list[Read] = []
        self.rates: list[Any] = []  # of dropouts

    def one(self, tensor: Tensor, dim: int, size: int) -> int:
        node = self.node_of(tensor) if size != 1 else None
        return size if node is None else TracedInt(size, Follows(node, dim))

    def all_entries(self, tensor: Tensor, count: int) -> int:
        """What the code gets for the number of a tensor's entries."""
        node = self.node_of(tensor)
        return (
            count if node is None else SizeNumber(count, tuple(Follows(node, d) for d in range(tensor.dim())))
        )

    def read(self, how: str, tensor: Tensor, function: Callable[[Tensor], Any]) -> Any:
        if self.hollow is not None:
            self.hollow.reads(tensor)
        with _disable_current_modes():
            value = tensor.detach().clone()
        node = self.node_of(tensor)
        note_left(node, how, user_line())
        self.reads.append(Read(how, node, value, user_line()))
        return function(tensor)

    def product(self, number: int, run: Callable[[], Any]) -> Any:
        self.within(number)
        try:
            return run()
        finally:
            self.within(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        rate = rate_of_dropout(name, args)
        if rate is not None:
            self.rates.append(rate)
        if inside_transform():
            return func(*args, **(kwargs or {}))
        if name == "__set__" and getattr(func, "__self__", None) is Tensor.data:
            self.assign(args[0], args[1])
        result = super().__torch_function__(func, types, args, kwargs)
        if name == "__len__":
            note_length(self.node_of(args[0]), result, user_line())
        elif name in PARTS and not any(isinstance(arg, list | tuple) for arg in args[1:]):
            dim = (kwargs or {}).get("dim", args[PARTS[name]] if len(args) > PARTS[name] else 0)
            note_parts(self.node_of(args[0]), dim % args[0].dim(), result, user_line())
        elif name in _MAKING and any(isinstance(n, SizeNumber) for n in _numbers(args)):
            node = self.node_of(result)
            if node is not None:
                node.meta["of_sizes"] = True
        elif name in ("numel", "nelement") and type(result) is int:
            return self.all_entries(args[0], result)
        if name == "flatten" and isinstance(result, Tensor):
            node = self.node_of(result)
            if node is not None:
                node.meta["derived"] = True  # torch computes the size from the shape
        elif name in RESHAPES and isinstance(result, Tensor) and isinstance(args[0], Tensor):
            self._follow(name, args, kwargs or {}, result)
        elif name in REPEATS and isinstance(result, Tensor):
            self._repeat(name, args, kwargs or {}, result)
        elif isinstance(result, Tensor) and self._is_made(result):
            self._made(list(args), kwargs or {}, result)
        elif name == "lstm":
            self._project(args[1], args[2])
        elif args and isinstance(args[0], Tensor):
            self._cut(name, args[0], list(args[1:]), kwargs or {})
        return result

    def _project(self, state: Any, weights: Sequence[Tensor]) -> None:
        """An LSTM's projection must stay narrower than what it projects (torch refuses others): both keep the
        same share.

        Args:
            state: (what is given on, [.., projected or hidden size]; the cell, [.., hidden size]).
            weights: of all layers and directions in a row; a projection is [projected size, hidden size].
        """
        projected, hidden = (part.shape[-1] for part in state)
        if projected == hidden:
            return
        for weight in weights:
            node = self.node_of(weight) if weight.shape == (projected, hidden) else None
            if node is not None:
                node.meta["follows"] = {0: Follows(node, 1)}

    def _cut(self, name: str, x: Tensor, args: list[Any], kwargs: Mapping[str, Any]) -> None:
        """Note the parts whose sizes were computed from other sizes."""
        found: list[Cut] = []
        if name in ("__getitem__", "__setitem__"):
            found = [cut for dim, start, stop in _indexed(x, args[0]) for cut in _cuts(x, dim, start, stop)]
        elif name == "narrow":
            dim, start, length = (*args, *(kwargs[key] for key in ("dim", "start", "length")[len(args) :]))
            if not isinstance(start, Tensor):
                found = list(_cuts(x, dim % x.dim(), start, start + length))
        elif name in SPLITS:
            sizes = (
                args[0]
                if args
                else next(
                    kwargs[key]
                    for key in ("split_size_or_sections", "split_size", "split_sizes")
                    if key in kwargs
                )
            )
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            found = list(_split(x, dim % x.dim(), sizes))
        node = self.node_of(x) if found else None
        if node is not None:
            node.meta["cuts"] = [*node.meta.get("cuts", []), *found]

    def _repeat(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        """Note where the sizes come from to which dims of size 1 grew."""
        sizes = list(args[1:]) or list(kwargs.values())
        if name == "expand_as":
            sizes = [self.one(sizes[0], dim, size) for dim, size in enumerate(sizes[0].shape)]
        sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
        first = result.dim() - len(sizes)
        grown = [(first + i, n) for i, n in enumerate(sizes) if isinstance(n, TracedInt)]
        node = self.node_of(result)
        if node is not None:
            node.meta["repeated"] = {dim: n.source for dim, n in grown if result.shape[dim] == int(n)}

    def _is_made(self, result: Tensor) -> bool:
        node = self.node_of(result)
        return node is not None and node.op == "call_function" and family(op_name(node)) is Family.FACTORY

    def _made(self, args: list[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """A tensor of constants is made: where its sizes come from."""
        sizes = [arg for arg in args if not isinstance(arg, Tensor)] or [kwargs.get("size", ())]
        if isinstance(sizes[0], list | tuple):
            sizes = list(sizes[0])
        if len(sizes) == 1 and len(set(result.shape)) == 1:  # a square one
            sizes *= result.dim()
        found = {dim: n.source for dim, n in enumerate(sizes) if isinstance(n, TracedInt)}
        node = self.node_of(result)
        given = tuple(int(n) for n in sizes if isinstance(n, int))
        if node is not None and found and len(given) == len(sizes) and given == tuple(result.shape):
            node.meta["follows"] = found

    def _follow(self, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        sizes = list(args[1:]) or list(kwargs.values())
        first = 0
        if name == "unflatten":
            dim, sizes = (
                (args[1] if len(args) > 1 else kwargs["dim"]),
                [args[2] if len(args) > 2 else kwargs["sizes"]],
            )
            first = dim % args[0].dim()
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = list(sizes[0])
        found = {first + i: n.source for i, n in enumerate(sizes) if isinstance(n, TracedInt)}
        node = self.node_of(result) if found else None
        if node is not None:
            node.meta["follows"] = {**node.meta.get("follows", {}), **found}


_MAKING = frozenset(("tensor", "as_tensor", "scalar_tensor"))


def _numbers(given: Any) -> Iterator[Any]:
    """The numbers among arguments, those of nested lists as well."""
    for item in given:
        if isinstance(item, list | tuple):
            yield from _numbers(item)
        else:
            yield item


def _cuts(x: Tensor, dim: int, start: Any, stop: Any) -> Iterator[Cut]:
    """What must keep its share for the code to find the same entries between `start` and `stop`."""
    size = x.shape[dim]
    part = slice(*(None if end is None else int(end) for end in (start, stop))).indices(size)[:2]
    for end, place in zip((start, stop), part, strict=True):
        if isinstance(end, TracedInt) and 0 < abs(int(end)) <= size:
            yield Cut(dim, *((0, place) if int(end) > 0 else (place, size)), end.source)


def _indexed(x: Tensor, index: Any) -> Iterator[tuple[int, Any, Any]]:
    """The slices among what a tensor is indexed with."""
    items = index if isinstance(index, tuple) else (index,)
    if any(
        isinstance(item, bool) or not isinstance(item, int | slice | types.NoneType | types.EllipsisType)
        for item in items
    ):
        return  # picked by index
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += x.dim() - sum(isinstance(other, int | slice) for other in items)
        elif item is not None:
            if isinstance(item, slice) and item.step in (None, 1):
                yield dim, item.start, item.stop
            dim += 1


def _split(x: Tensor, dim: int, sizes: Any) -> Iterator[Cut]:
    """Parts of a dim that is cut into parts of these sizes."""
    first = 0
    for size in sizes if isinstance(sizes, list | tuple) else [sizes]:
        last = first + int(size)
        if isinstance(size, TracedInt):
            yield Cut(dim, first, last, size.source)
        first = last
