"""Edit: one number in a module that changes, an attribute or one in its code; or one call that is left out."""

from __future__ import annotations

import dataclasses
import re

from surgeon.errors import MendError, PlanError


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
            reads: the new number takes the place of that one use of the old one). A method of a base class that
            is overridden, and called by `super()`, is "Class.method".
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
    "source": r"([^\W\d]\w*\.)?[^\W\d]\w*:\d{1,6}",
    "use": r"([^\W\d]\w*\.)?[^\W\d]\w*:\d{1,6}:[^\W\d]\w*(\.\w+|\[[^]\n]{1,80}\]){0,7}",
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


def misfit(edit: Edit, why: str) -> MendError:
    change = (
        f"leave out {edit.name}"
        if edit.kind == "operand"
        else f"change {edit.name} from {edit.old} to {edit.new}"
    )
    return MendError(
        f"cannot {change}", where=f"module '{edit.module}'", why=why,
        fix="make the plan anew for this version of the model's code",
    )  # fmt: skip
