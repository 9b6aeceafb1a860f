"""Folds of what is constant per channel: a batch norm, a factor or a summand, into the layer before it or
after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgeon.fusion import affine, forward
from surgeon.fusion.channels import features, follow, labels_of, per_channel
from surgeon.fusion.fold import Fold, Foldable, family_of, set_module
from surgeon.fusion.owners import NORMS, TRANSPOSED
from surgeon.graph import python_calls
from surgeon.graph.arguments import arguments
from surgeon.graph.graph import spec
from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit
from surgeon.ops.families.elementwise import affine as affine_of
from surgeon.ops.table import op_name, product

_Affine = tuple[Tensor, Tensor]


def after(site: Foldable) -> Iterator[Fold]:
    """conv-bn, linear-bn, conv-scale, linear-shift and so on: an op that alone reads a layer's output."""
    for node in site.graph.fx.nodes:
        layer = site.owners.layer(node)
        if layer is None:
            continue
        end, labels = follow(*site.owners.value(node))
        if len(end.users) != 1:
            continue
        (op,) = end.users
        found = _affine(site, op, end, labels)
        if found is not None:
            (scale, shift), kind, leave, gone = found
            path, name = node.meta["module"], _kind(layer)
            fold = partial(affine.after, layer, scale, shift, f"'{path}' + '{gone}'")
            yield Fold(
                f"{name}-{kind}",
                path,
                gone,
                frozenset({node, op, op.meta["module"]}),
                _removed(op),
                _both(fold, leave),
            )


def before(site: Foldable) -> Iterator[Fold]:
    """bn-conv, scale-linear and so on: an op that only a layer reads, where no padding comes between them."""
    for op in site.graph.fx.nodes:
        value = _value(op)
        data = _data(site, op)
        if value is None or data is None:
            continue
        dim = _channel_dim(site, op, data)
        if dim is None or len(value.users) != 1:
            continue
        own = labels_of(data, dim)
        end, labels = follow(value, own)
        node: Any = next(iter(end.users)) if len(end.users) == 1 else None
        layer = site.owners.layer(node)
        index = features(labels) if layer is not None else None
        if index is None or _input(node) is not end:
            continue
        found = _affine(site, op, data, own)
        if found is None:
            continue
        (scale, shift), kind, leave, gone = found
        scale, shift = scale[index], shift[index]
        padded = node.target is torch.ops.aten.convolution.default and (
            any(node.args[4]) or isinstance(layer, TRANSPOSED)
        )
        if padded and bool((shift != 0).any()):
            continue  # the layer pads with zeros what is shifted here: no weight can tell the two apart
        path = node.meta["module"]
        fold = partial(affine.before, layer, scale, shift, f"'{gone}' + '{path}'")
        yield Fold(
            f"{kind}-{_kind(layer)}",
            path,
            gone,
            frozenset({node, op, op.meta["module"]}),
            _removed(op),
            _both(fold, leave),
        )


def _affine(
    site: Foldable, op: fx.Node, data: fx.Node, labels: Tensor
) -> tuple[_Affine, str, Callable[[], None], str] | None:
    """((s, t) per label, kind, what takes the op out of the model, what leaves) if `op` is s * data + t for
    each label.
    """
    norm = site.owners.norm(op)
    if norm is not None:
        way = _norm_leaves(site, op, norm)
        if op.args[0] is not data or way is None or spec(data).dtype != norm.running_mean.dtype:
            return None
        scale, shift = affine.of_norm(norm)
        s, t = per_channel(_along(scale, data), labels), per_channel(_along(shift, data), labels)
        if s is None or t is None:
            return None
        return (s, t), "bn", way, op.meta["module"]
    family = family_of(op)
    if family not in ("scale", "shift") or _data(site, op) is not data or spec(op) != spec(data):
        return None
    position = op.args.index(data)
    other = op.args[1 - position] if len(op.args) > 1 else None
    value = site.constants.value(other) if isinstance(other, fx.Node) else _number(other)
    values = None if value is None else per_channel(value.to(torch.float64), labels)
    way = _op_leaves(site, op, other, family)
    if (
        values is None
        or way is None
        or (isinstance(other, fx.Node) and spec(other).dtype != spec(data).dtype)
    ):
        return None
    affine_form = _form(op, values, position)
    return (
        None if affine_form is None else (affine_form, family, way, f"{op_name(op)} in '{op.meta['module']}'")
    )


def _form(op: fx.Node, values: Tensor, position: int) -> _Affine | None:
    """(s, t) of an op with the data at `position` and the constant at the other."""
    operands = {"self": None, "other": values} if position == 0 else {"self": values, "other": None}
    form = affine_of(op_name(op), {**arguments(op), **operands})
    if form is None:
        return None
    nothing = torch.zeros_like(values)
    return nothing + form[0], nothing + form[1]


def _norm_leaves(site: Foldable, op: fx.Node, norm: nn.Module) -> Callable[[], None] | None:
    path = op.meta["module"]
    if type(norm) in NORMS:
        return lambda: set_module(site.model, path, nn.Identity().eval())
    edit = forward.norm_call(norm, path)  # a subclass that does more than to normalise
    if edit is None:
        return None

    def leave() -> None:
        apply_edit(site.model, edit)
        norm._parameters.update(dict.fromkeys(norm._parameters))  # nothing reads its scale and shift any more

    return leave


def _op_leaves(site: Foldable, op: fx.Node, other: Any, family: str) -> Callable[[], None] | None:
    path = op.meta["module"]
    module = site.owners.code(path)
    if module is None:
        return None
    key: forward.Key = (frozenset(), () if isinstance(other, fx.Node) else (float(other),))
    if isinstance(other, fx.Node):
        prefix = f"{path}." if path else ""
        held = _tensors(other)
        if not all(name.startswith(prefix) for name in held):
            return None  # a tensor of another module: which call reads it is not known
        key = (frozenset(name.removeprefix(prefix) for name in held), ())
    names = python_calls.SCALES if family == "scale" else python_calls.SHIFTS
    edit: Edit | None = forward.constant_call(module, path, names, key)
    if edit is None:
        return None
    if path and _alone(site, op, module):
        return lambda: set_module(site.model, path, nn.Identity().eval())
    return lambda: apply_edit(site.model, edit)


def _alone(site: Foldable, op: fx.Node, module: nn.Module) -> bool:
    """Whether the module does nothing but this op, on its only input."""
    path = op.meta["module"]
    code = forward.traced(module)
    if (
        code is None
        or any(True for _ in module.children())
        or sum(n.op == "placeholder" for n in code.graph.nodes) != 1
    ):
        return False
    own = [
        n for n in site.graph.fx.nodes if n.op == "call_function" and n.meta["module"] == path and n is not op
    ]
    return all(n in site.constants for n in own)


def _tensors(node: fx.Node) -> set[str]:
    if node.op == "get_attr":
        return {str(node.target)}
    return set().union(*(_tensors(used) for used in node.all_input_nodes))


def _number(value: Any) -> Tensor | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(float(value), dtype=torch.float64) if is_number else None


def _data(site: Foldable, op: fx.Node) -> fx.Node | None:
    """The operand of a norm or elementwise op that is no constant."""
    if family_of(op) not in ("norm", "scale", "shift") or op in site.constants:
        return None
    if family_of(op) == "norm":
        return op.args[0] if isinstance(op.args[0], fx.Node) else None
    given = [a for a in op.args[:2] if isinstance(a, fx.Node) and a not in site.constants]
    return given[0] if len(given) == 1 and len(op.args) > 1 else None


def _channel_dim(site: Foldable, op: fx.Node, data: fx.Node) -> int | None:
    """The dim along which the constant of an op varies; 1 for a batch norm."""
    shape = spec(data).shape
    if family_of(op) == "norm":
        return 1
    other = next((a for a in op.args[:2] if a is not data), None)
    if not isinstance(other, fx.Node):
        return len(shape) - 1 if shape else None
    sizes = spec(other).shape
    wide = [d + len(shape) - len(sizes) for d, n in enumerate(sizes) if n > 1]
    return wide[0] if len(wide) == 1 and wide[0] >= 0 else None


def _value(op: fx.Node) -> fx.Node | None:
    """The node of an op's value: of a norm, its first output."""
    if family_of(op) != "norm":
        return op
    return next((user for user in op.users if user.args[1] == 0), None)


def _input(node: fx.Node) -> Any:
    """What a layer's run reads."""
    products = product(node)
    return node.args[0] if products is None else arguments(node)[products.operands[0].name]


def _along(values: Tensor, data: fx.Node) -> Tensor:
    return values.reshape(-1, *[1] * (len(spec(data).shape) - 2))


def _kind(layer: nn.Module) -> str:
    return "linear" if isinstance(layer, nn.Linear) else "conv"


def _removed(op: fx.Node) -> Counter[str]:
    return Counter([family_of(op) or ""])


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def make() -> None:
        first()
        second()

    return make
