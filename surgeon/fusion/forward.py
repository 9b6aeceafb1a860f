"""Take an op out of the code that runs it: which call of a module's own forward it is, as an `Edit` of kind
"operand".

The forward of that one module is traced with its children as calls. The call is found by what it is called
and what it reads (constants by their names or numbers, branches by the children that compute them), and only
if no other call fits.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from surgeon.graph.python_calls import ADDS, NORMALISES
from surgeon.mend.edits import Edit
from surgeon.mend.methods.traced_forward import calls, trace_one

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASSING = (nn.Identity, *DROPOUTS)
Key = tuple[
    frozenset[str], tuple[float, ...]
]  # what a constant is made of: names of tensors, and a number if it is one


def traced(module: nn.Module) -> fx.GraphModule | None:
    """The module's own forward, or None if it cannot be traced."""
    try:
        return trace_one(module, buffers=True)
    except Exception:  # noqa: BLE001  # the model's own code under tracing: whatever it raises, this fold is not possible
        return None


def norm_call(module: nn.Module, path: str) -> Edit | None:
    """The one batch_norm call of a module's forward, replaced by what it normalises."""
    code = traced(module)
    found = [] if code is None else [(i, node) for name, i, node in calls(code) if name in NORMALISES]
    if len(found) != 1 or not found[0][1].args or not isinstance(found[0][1].args[0], fx.Node):
        return None
    return Edit(path, "operand", f"batch_norm:{found[0][0]}:0.0")


def constant_call(module: nn.Module, path: str, names: Collection[str], key: Key) -> Edit | None:
    """The one call of a function of these names that has the constant of this key as an operand, replaced by its other
    operand.
    """
    code = traced(module)
    found = []
    for name, count, node in calls(code) if code is not None else ():
        if name not in names or len(node.args) < 2:
            continue
        keys = [_key(operand) for operand in node.args[:2]]
        for position in (0, 1):
            if keys[position] is None and keys[1 - position] == key:
                found.append(Edit(path, "operand", f"{name}:{count}:0.{position}"))
    return found[0] if len(found) == 1 else None


def branches_call(module: nn.Module, path: str, parts: tuple[str | None, str | None]) -> Edit | None:
    """The one sum of two branches, replaced by the first of them.

    Args:
        parts: path of the layer that computes each branch; None for the input of the other branch itself.
    """
    code = traced(module)
    if code is None:
        return None
    found = []
    prefix = f"{path}." if path else ""
    for name, count, node in calls(code):
        if name not in ADDS or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            continue
        ends = [_passed(operand, code) for operand in node.args]
        for order in ((0, 1), (1, 0)):
            first, second = ends[order[0]], ends[order[1]]
            inside = (_runs(first, prefix, parts[0]), _runs(second, prefix, parts[1]))
            same = parts[1] is not None or (inside[0] and _passed(first.args[0], code) is second)
            in_place = name.endswith("_") or name == "iadd"
            if (
                inside[0]
                and (inside[1] or parts[1] is None)
                and same
                and not (in_place and (order != (0, 1) or None in parts))
            ):
                found.append(Edit(path, "operand", f"{name}:{count}:0.{order[0]}"))
    return found[0] if len(found) == 1 else None


def _passed(operand: Any, code: fx.GraphModule) -> Any:
    """What an operand is before modules that pass it on unchanged."""
    while isinstance(operand, fx.Node) and operand.op == "call_module" and operand.args:
        if type(code.get_submodule(str(operand.target))) not in _PASSING:
            break
        operand = operand.args[0]
    return operand


def _runs(node: Any, prefix: str, layer: str | None) -> bool:
    """Whether this is the call of the child that is, or holds, the layer."""
    if layer is None or not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1:
        return False
    return f"{layer}.".startswith(f"{prefix}{node.target}.")


def _key(operand: Any) -> Key | None:
    """What a constant operand is made of; None if it depends on an input or a child."""
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return frozenset(), (float(operand),)
    if not isinstance(operand, fx.Node) or operand.op in ("placeholder", "call_module"):
        return None
    if operand.op == "get_attr":
        return frozenset({str(operand.target)}), ()
    keys = [_key(used) for used in operand.all_input_nodes]
    if not keys or None in keys:
        return None
    return frozenset().union(*(key[0] for key in keys if key is not None)), ()
