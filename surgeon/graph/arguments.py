"""Arguments of an op, by the names of its schema.

Ops that compute the same have other orders of arguments (the causal flag of fused attention is the fifth, sixth or
seventh of them), and what equals its default need not be given. So no argument is read by its position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx


class Arguments(Mapping[str, Any]):
    """What an op was called with, defaults included: name -> value.

    A name may hold alternatives, for ops that call one thing by several names: `arguments["attn_bias|attn_mask"]` is
    the first of them that the schema has.

    Args:
        target: an `OpOverload`. Plain functions, such as `operator.getitem`, have the names arg0, arg1, ...

    Example: of `aten.sum.dim_IntList(x, [1])` these are self=x, dim=[1], keepdim=False, dtype=None.
    """

    def __init__(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._target, self.args, self.kwargs = target, tuple(args), dict(kwargs)
        known = _declared(target) if hasattr(target, "_schema") else None
        self.places: Mapping[str, int] = known[0] if known else {f"arg{i}": i for i in range(len(args))}
        given = {**(known[1] if known else {}), **dict(zip(self.places, args, strict=False)), **kwargs}
        self._values: dict[str, Any] = {name: given[name] for name in self.places if name in given}

    def __getitem__(self, name: str) -> Any:
        values = self._values
        return values[name] if name in values else values[self.name(name)]

    def get(self, name: str, default: Any = None) -> Any:
        values = self._values
        if name in values:
            return values[name]
        return values[self.name(name)] if name in self else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values or not self._values.keys().isdisjoint(str(name).split("|"))

    def replaced(self, name: str, value: Any) -> Arguments:
        """The same with another value of one argument, passed as it was."""
        name = self.name(name)
        place = self.places[name]
        if name in self.kwargs or place >= len(self.args):
            return Arguments(self._target, self.args, {**self.kwargs, name: value})
        return Arguments(self._target, (*self.args[:place], value, *self.args[place + 1 :]), self.kwargs)

    def name(self, names: str) -> str:
        """The one of the alternatives that the op has.

        Raises:
            KeyError: it has none of them; what declares the op is wrong.
        """
        for own in names.split("|"):
            if own in self._values:
                return own
        raise KeyError(f"{self._target} has no argument {names}, but {', '.join(self._values)}")


@functools.lru_cache(maxsize=4096)
def _declared(target: Any) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    """The places of an op's arguments, and the defaults of those that have one."""
    declared = target._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    return {argument.name: i for i, argument in enumerate(declared)}, defaults


def arguments(node: fx.Node) -> Arguments:
    """The arguments of a recorded op, by name. Bound once: recorded nodes do not change."""
    found: Arguments | None = node.meta.get(_BOUND)
    if found is None:
        found = node.meta[_BOUND] = Arguments(node.target, node.args, node.kwargs)
    return found


_BOUND = "arguments"
