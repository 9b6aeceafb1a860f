"""What a file says of its inputs and outputs: the names of the model's arguments, named dims, true shapes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgeon.onnx.compare import Inputs

BATCH = "batch"


@dataclasses.dataclass(frozen=True)
class OpenDim:
    """A dim of an input that is to stay open.

    Attributes:
        argument: as in an expression: "x", "batch['mask']".
        dim: which one. name: that was asked for; "" if none was.
        size: in the example inputs.
    """

    argument: str
    dim: int
    name: str
    size: int

    def __str__(self) -> str:
        return f"dim {self.dim}{f' ({self.name})' if self.name else ''} of input '{self.argument}'"


def open_dims(model: nn.Module, inputs: Inputs, shapes: Any) -> list[list[OpenDim]]:
    """For each tensor of the inputs in order, the dims that `dynamic_shapes` asks to leave open."""
    found = []
    for number, (argument, value) in enumerate(_arguments(model, inputs)):
        if isinstance(shapes, Mapping):
            spec = shapes.get(argument)
        else:
            spec = shapes[number] if isinstance(shapes, list | tuple) and number < len(shapes) else None
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                inner = _spec_at(spec, path)
                asked = dict(enumerate(inner)) if isinstance(inner, list | tuple) else inner or {}
                name = f"{argument}{pytree.keystr(path)}"
                found.append([
                    OpenDim(name, dim, _name_of(what), leaf.shape[dim])
                    for dim, what in asked.items() if _is_open(what) and dim < leaf.ndim
                ])  # fmt: skip
    return found


def _spec_at(spec: Any, path: Sequence[Any]) -> Any:
    """What stands in a nest of dims at the place of a tensor."""
    for key in path:
        place = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        if isinstance(spec, Mapping):
            spec = spec.get(place)
        elif isinstance(spec, list | tuple) and isinstance(place, int) and place < len(spec):
            spec = spec[place]
        else:
            return None
    return spec if isinstance(spec, Mapping | list | tuple) else None


def _is_open(what: Any) -> bool:
    """Whether a dim must vary: it has a name, is a `Dim`, or `Dim.DYNAMIC`; `Dim.AUTO` leaves that to the exporter."""
    hint = getattr(getattr(what, "type", None), "name", "DYNAMIC")
    return what is not None and not isinstance(what, int) and hint == "DYNAMIC"


def _name_of(what: Any) -> str:
    return what if isinstance(what, str) else str(getattr(what, "__name__", ""))


def closed_dims(proto: Any, asked: Sequence[Sequence[OpenDim]]) -> list[OpenDim]:
    """Dims that were to stay open and have one size in the file."""
    if len(asked) != len(proto.graph.input):
        return []
    found = []
    for item, dims in zip(proto.graph.input, asked, strict=True):
        declared = item.type.tensor_type.shape.dim
        found += [one for one in dims if one.dim < len(declared) and declared[one.dim].HasField("dim_value")]
    return found


def fixed_values(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Arguments that are no tensors, as `name = value`: they are constants of the file."""
    found = []
    for name, value in _arguments(model, inputs):
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if leaf is not None and not isinstance(leaf, Tensor):
                found.append(f"{name}{pytree.keystr(path)} = {leaf!r}"[:80])
    return tuple(found)


def settle_inputs(proto: Any, model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> None:
    """Give the file's inputs the names of the arguments, and the dim of the batch its name.

    The exporter calls an input otherwise that is an output as well, and a dim where another argument is a number.
    """
    wanted = list(_leaf_names(model, inputs))
    graph = proto.graph
    if len(wanted) != len(graph.input):
        return
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {
        i.name for i in graph.output
    }
    renamed = {
        item.name: name
        for item, name in zip(graph.input, wanted, strict=True)
        if name is not None and name != item.name and name not in taken
    }
    _rename_values(graph, renamed)
    dims = [
        item.type.tensor_type.shape.dim[0].dim_param
        for item in graph.input
        if item.type.tensor_type.shape.dim
    ]
    named = {dim for dim in dims if dim and dim != BATCH}
    if dynamic_batch and len(named) == 1:
        _rename_dim(graph, named.pop(), BATCH)


def clear_stale_shapes(proto: Any, runs: Sequence[Sequence[tuple[int, ...]]]) -> bool:
    """Take sizes out of the declared shapes of outputs that a run did not give; whether there were any.

    Args:
        runs: the shapes of all outputs, for each run.
    """
    stale = False
    for place, item in enumerate(proto.graph.output):
        dims = item.type.tensor_type.shape.dim
        for number, dim in enumerate(dims):
            found = {run[place][number] for run in runs if len(run[place]) == len(dims)}
            if dim.HasField("dim_value") and found - {dim.dim_value}:
                dim.Clear()
                stale = True
    if stale:  # what is said of values on the way is as doubtful
        del proto.graph.value_info[:]
    return stale


def _arguments(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """(name, value) of the arguments of forward; those of `*args` and `**kwargs` one by one."""
    args, kwargs = inputs
    signature = inspect.signature(model.forward)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}_{number}", each) for number, each in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD and isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _leaf_names(model: nn.Module, inputs: Inputs) -> Iterator[str | None]:
    """For each tensor in order: its argument's name, or None if it lies in a nest and the exporter names it."""
    for name, value in _arguments(model, inputs):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield name if leaf is value else None


def _rename_values(graph: Any, renamed: Mapping[str, str]) -> None:
    for item in (*graph.input, *graph.output, *graph.value_info):
        item.name = renamed.get(item.name, item.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = renamed.get(name, name)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename_values(inner, renamed)


def _rename_dim(graph: Any, before: str, after: str) -> None:
    """In expressions such as `2*s77`, too."""
    word = re.compile(rf"\b{re.escape(before)}\b")
    for item in (*graph.input, *graph.output, *graph.value_info):
        for dim in item.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = word.sub(after, dim.dim_param)
