"""rewrite(module, edit): another number in a module's code.

A number is changed in the source of one of its methods or in its traced forward, where a call may be left out as
well; the module becomes an instance of a subclass of its class."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from surgeon.graph.source_code import is_traced, methods_as_written, methods_of_class
from surgeon.mend.edits import Edit, misfit
from surgeon.mend.methods.source_edit import changed, with_use
from surgeon.mend.methods.traced_forward import calls, constants, counterpart, methods_of, versions

IN_SOURCE = ("source", "use")  # kinds of edits of the source of a method


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
        raise misfit(edit, "there is no such method")
    if method in vars(type(module)) and is_traced(vars(type(module))[method]):
        raise misfit(edit, "its traced forward was changed already")
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
        raise misfit(edit, str(error)) from error
    _become(module, {**_changed(module), method: new}, edit)


def _changed(module: nn.Module) -> dict[str, Any]:
    """The methods that were changed already, by the names that `methods_as_written` gives them."""
    found: dict[str, Any] = {}
    for kind in type(module).__mro__:
        if "_surgeon_edits" in vars(kind):  # () of a class that `_become` put in between
            prefix = "" if vars(kind)["_surgeon_edits"] else f"{kind.__name__}."
            found |= {f"{prefix}{name}": value for name, value in methods_of_class(kind).items()}
    return found


def _order(edit: Edit) -> tuple[bool, int]:
    return edit.kind == "use", -int(edit.name.split(":")[1])


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """The edits of its code that a module's class was made with."""
    found: tuple[Edit, ...] = getattr(type(module), "_surgeon_edits", ())
    return found


def _rewrite_forward(module: nn.Module, edit: Edit) -> None:
    """Replace one number in one call of the module's forward, or the call by one of its operands."""
    name, occurrence, place = edit.name.split(":")
    try:
        found = versions(module, buffers=edit.kind == "operand")
    except Exception as error:  # torch.fx raises anything that the traced code raises
        raise misfit(edit, f"its forward cannot be traced by torch.fx: {error}") from error
    first, *others = found.values()
    call = next(
        (node for called, count, node in calls(first) if called == name and count == int(occurrence)), None
    )
    if call is None:
        raise misfit(edit, "the call is not there")
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
        raise misfit(edit, str(error)) from error
    for traced in found.values():
        for constant, value in constants(traced).items():
            setattr(module, constant, value)
    _become(module, own, edit)


def _operand(call: fx.Node, place: str, edit: Edit) -> fx.Node:
    found: Any = (call.args, call.kwargs)
    for part in place.split("."):
        found = _item(found, part, edit)
    if not isinstance(found, fx.Node):
        raise misfit(edit, f"it is {found!r}, no operand")
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
    """Give the module other methods, as a subclass of its class.

    A method that another one overrides, "Class.method", is put where `super()` looks: into a class between the one that
    overrides it and its own.
    """
    base, *others = (kind for kind in type(module).__mro__ if "_surgeon_edits" not in vars(kind))
    between = []
    for kind in others:
        prefix = f"{kind.__name__}."
        overridden = {
            name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)
        }
        if overridden:
            own = {name: value for name, value in own.items() if not name.startswith(prefix)}
            named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_surgeon_edits": ()}
            between.append(type(kind.__name__, (kind,), {**overridden, **named}))
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
    module.__class__ = type(base.__name__, (base, *between), members)


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
            raise misfit(edit, f"it holds {item!r}")
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
    raise misfit(edit, f"there is nothing at {key}")
