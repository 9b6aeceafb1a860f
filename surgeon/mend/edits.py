"""Edits: change one number in a module, an attribute or one in its code; and keep torch's own layers' numbers
in step.

`refresh` sets the numbers that torch's own layers keep beside their tensors from the tensors' shapes;
`apply_edit` makes an `Edit`. A number in a module's code is changed in the source of one of its methods or in
its traced forward, where a call may be left out as well; the module becomes an instance of a subclass of its
class.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx, nn

from surgeon.errors import MendError, PlanError
from surgeon.graph.source_code import is_traced, methods, methods_as_written
from surgeon.mend.attribute_path import number_at, set_path
from surgeon.mend.source_edit import changed, with_use
from surgeon.mend.traced_forward import calls, constants, counterpart, methods_of, versions

IN_SOURCE = ("source", "use")  # kinds of edits of the source of a method


@dataclasses.dataclass(frozen=True)
class Edit:
    """One number in a module that changes, or one call that is left out.

    Attributes:
        module: path of the module.
        kind: "attribute" (`name` is a path such as "num_heads", "config.hidden_size" or
            "normalized_shape.0"), "literal" (`name` is "function:occurrence:position" of a call in the
            module's forward), "operand" (so it is; the operand at that position takes the place of the call's
            result), "source" (`name` is "method:which" of the whole numbers in the source of one of its
            methods, as the user wrote it) or "use" ("method:which:self.width", of the names that a method
            reads: the new number takes the place of that one use of the old one).
        old, new: the number before and after; for "operand" they mean nothing.
    """

    module: str
    kind: str
    name: str
    old: int = 0
    new: int = 0

    def __post_init__(self) -> None:
        if problem := _malformed(self):
            raise PlanError("this is no edit", where=f"module '{self.module}'", why=problem)


_FORMS = {
    "attribute": r"[^.]+(\.[^.]+){0,7}",
    "literal": r"[^:]+:\d{1,6}:\w+(\.\w+){0,7}",
    "operand": r"[^:]+:\d{1,6}:\w+(\.\w+){0,7}",
    "source": r"[^\W\d]\w*:\d{1,6}",
    "use": r"[^\W\d]\w*:\d{1,6}:[^\W\d]\w*(\.\w+|\[[^]\n]{1,80}\]){0,7}",
}  # of an edit's name, by kind


def _malformed(edit: Edit) -> str:
    """What is wrong with an edit before any module is looked at; "" if nothing is."""
    if (
        not all(isinstance(text, str) for text in (edit.module, edit.kind, edit.name))
        or edit.kind not in _FORMS
    ):
        return f"its kind is {edit.kind!r}; {', '.join(_FORMS)} are known"
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (edit.old, edit.new)):
        return f"it puts {edit.new!r} in the place of {edit.old!r}: whole numbers are expected"
    if edit.kind == "source" and min(edit.old, edit.new) < 0:
        return "a number in source has no sign"
    if not re.fullmatch(_FORMS[edit.kind], edit.name):
        return f"{edit.name!r} is no name of a number ({edit.kind})"
    if any(part.startswith("__") for text in (edit.module, edit.name) for part in re.split("[.:]", text)):
        return f"{edit.module or edit.name!r} leads out of the module's own data"
    return ""


def _linear(m: Any) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(m: Any) -> dict[str, Any]:
    return dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True))


def _convolution(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    return {"out_channels": first, "in_channels": second * m.groups}


def _transposed(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    return {"in_channels": first, "out_channels": second * m.groups}


def _batch_norm(m: Any) -> dict[str, Any]:
    known = m.weight if m.weight is not None else m.running_mean
    return {} if known is None else {"num_features": known.shape[0]}


def _group_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"num_channels": m.weight.shape[0]}


def _layer_norm(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _embedding(m: Any) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _multihead(m: Any) -> dict[str, Any]:
    query = (
        m.q_proj_weight if m.in_proj_weight is None else m.in_proj_weight
    )  # what out_proj gives may be narrower
    sizes = {"embed_dim": query.shape[1], "head_dim": m.out_proj.weight.shape[1] // m.num_heads}
    if m.in_proj_weight is not None:
        sizes |= {"kdim": sizes["embed_dim"], "vdim": sizes["embed_dim"]}
    else:
        sizes |= {"kdim": m.k_proj_weight.shape[1], "vdim": m.v_proj_weight.shape[1]}
    return sizes


def _recurrent(m: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    sizes = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_hh_l0.shape[0] // gates}
    if m.proj_size:
        sizes["proj_size"] = m.weight_hr_l0.shape[0]
        if sizes["proj_size"] >= sizes["hidden_size"]:
            raise MendError(
                f"an LSTM cannot project {sizes['hidden_size']} channels to {sizes['proj_size']}",
                why="torch wants proj_size < hidden_size",
                fix="remove the same share of both, or keep the layer with ignore=[...]",
            )
    return sizes


_LAYERS: tuple[tuple[tuple[type, ...], Callable[[Any], dict[str, Any]]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Bilinear,), _bilinear),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.MultiheadAttention,), _multihead),
    ((nn.RNNBase,), _recurrent),
    ((nn.PReLU,), lambda m: {"num_parameters": m.weight.shape[0]}),
)


def refresh(module: nn.Module, path: str = "") -> None:
    """Set the numbers that one of torch's own layers keeps beside its tensors from their shapes."""
    for kinds, sizes in _LAYERS:
        if isinstance(module, kinds):
            try:
                for name, value in sizes(module).items():
                    if getattr(module, name, None) != value:
                        setattr(module, name, value)
            except AttributeError as error:
                raise MendError(
                    f"a {type(module).__name__} lacks an attribute that this layer has",
                    where=path,
                    why=str(error),
                ) from error
            return


def apply_edit(model: nn.Module, edit: Edit) -> None:
    """Make one edit in `model`.

    Raises:
        MendError: the place does not hold the old number.
    """
    module = _module(model, edit)
    if edit.kind == "attribute":
        try:
            found = number_at(module, edit.name)
        except ValueError as error:
            raise _misfit(edit, str(error)) from error
        if found not in (edit.old, edit.new):
            raise _misfit(edit, f"it holds {found}")
        set_path(module, edit.name, edit.new)
        _derive(module)
        refresh(module, edit.module)
    else:
        rewrite(module, edit)


def _module(model: nn.Module, edit: Edit) -> nn.Module:
    """The module of an edit, by the names under which modules hold each other alone."""
    found: nn.Module | None = model
    for part in edit.module.split(".") if edit.module else ():
        found = None if found is None else dict(found._modules.items()).get(part)
    if found is None:
        raise _misfit(edit, "there is no such module")
    return found


def _derive(module: nn.Module) -> None:
    """Where a module's class says what its state is and how it comes back from it (einops), compute anew what
    it derives.
    """
    for kind in type(module).__mro__:
        if {"__getstate__", "__setstate__"} <= vars(kind).keys() and not kind.__module__.startswith("torch."):
            held: Any = kind
            held.__setstate__(module, held.__getstate__(module))
            return


def _misfit(edit: Edit, why: str) -> MendError:
    change = (
        f"leave out {edit.name}"
        if edit.kind == "operand"
        else f"change {edit.name} from {edit.old} to {edit.new}"
    )
    return MendError(
        f"cannot {change}", where=f"module '{edit.module}'", why=why,
        fix="make the plan anew for this version of the model's code",
    )  # fmt: skip


def rewrite(module: nn.Module, edit: Edit) -> None:
    """Make an edit of the module's code.

    The module becomes an instance of a subclass of its class that differs in its forward alone, or in the
    methods whose numbers changed: it stays the user's class, trains, deep-copies and pickles (by making the
    edits again).
    """
    if edit.kind in IN_SOURCE:
        _rewrite_source(module, edit)
    else:
        _rewrite_forward(module, edit)


def _rewrite_source(module: nn.Module, edit: Edit) -> None:
    """Compile the method anew from what the user wrote, with all numbers that were changed in it.

    So which number it is does not hang on what else was changed. Numbers come before names, and of names the
    last first: each change leaves the count of those that are still to change as it is.
    """
    method = edit.name.partition(":")[0]
    known = methods_as_written(module)
    if method not in known:
        raise _misfit(edit, "there is no such method")
    if method in vars(type(module)) and is_traced(vars(type(module))[method]):
        raise _misfit(edit, "its traced forward was changed already")
    changes: dict[tuple[str, str], Edit] = {}
    for each in (*edits_of(module), edit):
        if each.kind in IN_SOURCE and each.name.partition(":")[0] == method:
            first = changes.get((each.kind, each.name), each)
            changes[each.kind, each.name] = dataclasses.replace(each, old=first.old)
    new = known[method]
    try:
        for each in sorted(changes.values(), key=_order):
            _, which, *text = each.name.split(":")
            if each.kind == "source":
                new = changed(new, int(which), each.old, each.new)
            else:
                new = with_use(new, int(which), "".join(text), each.new)
    except ValueError as error:
        raise _misfit(edit, str(error)) from error
    current = methods(module)
    before = vars(type(module)) if "_surgeon_edits" in vars(type(module)) else {}
    _become(module, {**{key: current[key] for key in current if key in before}, method: new}, edit)


def _order(edit: Edit) -> tuple[bool, int]:
    return edit.kind == "use", -int(edit.name.split(":")[1])


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """The edits of its code that a module's class was made with."""
    found: tuple[Edit, ...] = getattr(type(module), "_surgeon_edits", ())
    return found


def undo_edits(model: nn.Module, edits: Collection[Edit]) -> None:
    """Put back what edits changed, whatever else was changed since."""
    for edit in edits:
        if edit.kind == "attribute":
            apply_edit(model, dataclasses.replace(edit, old=edit.new, new=edit.old))
    for path in {edit.module for edit in edits if edit.kind != "attribute"}:
        module = model.get_submodule(path)
        gone = [dataclasses.replace(edit, module="") for edit in edits if edit.module == path]
        left = [edit for edit in edits_of(module) if edit not in gone]
        module.__class__ = next(kind for kind in type(module).__mro__ if "_surgeon_edits" not in vars(kind))
        for edit in left:
            rewrite(module, edit)


def _rewrite_forward(module: nn.Module, edit: Edit) -> None:
    """Replace one number in one call of the module's forward, or the call by one of its operands."""
    name, occurrence, place = edit.name.split(":")
    try:
        found = versions(module, buffers=edit.kind == "operand")
    except Exception as error:
        raise _misfit(edit, f"its forward cannot be traced by torch.fx: {error}") from error
    first, *others = found.values()
    call = next(
        (node for called, count, node in calls(first) if called == name and count == int(occurrence)), None
    )
    if call is None:
        raise _misfit(edit, "the call is not there")
    for node, traced in [(call, first), *((counterpart(call, first, other), other) for other in others)]:
        if node is None:  # the other mode does not run it
            continue
        if edit.kind == "operand":
            _leave_out(node, _operand(node, place, edit))
        else:
            node.args, node.kwargs = _replaced((node.args, node.kwargs), place.split("."), edit)
        traced.recompile()
    try:
        own = methods_of(found)
    except ValueError as error:
        raise _misfit(edit, str(error)) from error
    for traced in found.values():
        for constant, value in constants(traced).items():
            setattr(module, constant, value)
    _become(module, own, edit)


def _operand(call: fx.Node, place: str, edit: Edit) -> fx.Node:
    found: Any = (call.args, call.kwargs)
    for part in place.split("."):
        found = _item(found, part, edit)
    if not isinstance(found, fx.Node):
        raise _misfit(edit, f"it is {found!r}, no operand")
    return found


def _leave_out(call: fx.Node, operand: fx.Node) -> None:
    """Put the operand where the call's result was; what served the call alone goes with it."""
    call.replace_all_uses_with(operand)
    unread = [call]
    while unread:
        node = unread.pop()
        if not node.users and node.op != "placeholder" and not node._erased:
            unread += [used for used in node.all_input_nodes if used is not operand]
            node.graph.erase_node(node)


def _become(module: nn.Module, own: Mapping[str, Callable[..., Any]], edit: Edit) -> None:
    """Give the module other methods, as a subclass of its class."""
    base = next(kind for kind in type(module).__mro__ if "_surgeon_edits" not in vars(kind))
    edits = (*edits_of(module), dataclasses.replace(edit, module=""))

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _unpickle, (base, edits), self.__dict__, None, None, _set_state

    members = {
        **own,
        "_surgeon_edits": edits,
        "__reduce_ex__": reduce,
        "__deepcopy__": _deepcopy,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    module.__class__ = type(base.__name__, (base,), members)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _unpickle(base: type[nn.Module], edits: tuple[Edit, ...]) -> nn.Module:
    made: nn.Module = base.__new__(base)
    made.__dict__["_surgeon_pending"] = edits
    return made


def _set_state(made: nn.Module, state: dict[str, Any]) -> None:
    edits = made.__dict__.pop("_surgeon_pending")
    made.__dict__.update(state)
    for edit in edits:
        rewrite(made, edit)


def _replaced(item: Any, keys: list[str], edit: Edit) -> Any:
    """A nest of arguments with another number at a place where a whole number is."""
    if not keys:
        if type(item) is not int or item not in (edit.old, edit.new):
            raise _misfit(edit, f"it holds {item!r}")
        return edit.new
    head, rest = keys[0], keys[1:]
    if isinstance(item, slice):
        return slice(*_replaced((item.start, item.stop, item.step), keys, edit))
    inner = _replaced(_item(item, head, edit), rest, edit)
    if isinstance(item, dict):
        return {**item, head: inner}
    new = [inner if place == int(head) else value for place, value in enumerate(item)]
    return tuple(new) if isinstance(item, tuple) else new


def _item(nest: Any, key: str, edit: Edit) -> Any:
    if isinstance(nest, dict) and key in nest:
        return nest[key]
    if isinstance(nest, list | tuple) and key.isdecimal() and int(key) < len(nest):
        return nest[int(key)]
    raise _misfit(edit, f"there is nothing at {key}")
