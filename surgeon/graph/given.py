"""check_given(call, ...): every argument of a public call is of the kind that stands there, or one error says what was
passed, where it seems to belong and how the call is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from torch import nn

from surgeon.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What may stand at a place of a call.

    Attributes:
        said: in a message, with its article.
        fits: whether a value is of this kind.
        how: what to pass.
    """

    said: str
    fits: Callable[[Any], bool]
    how: str


MODEL = Kind("a model", lambda value: isinstance(value, nn.Module), "pass the nn.Module itself")
PATH = Kind(
    "a path", lambda value: isinstance(value, str | os.PathLike), "pass a path: a text or a pathlib.Path"
)
TEXT = Kind("a text", lambda value: isinstance(value, str), "pass a text")
FACTORY = Kind(
    "a function that makes the original model",
    lambda value: callable(value) and not isinstance(value, nn.Module),
    "pass a function without arguments: the model's class, or lambda: Net(...)",
)


def check_given(call: str, **given: tuple[Any, Kind]) -> None:
    """Refuse arguments of the wrong kind.

    Args:
        call: as it is written, such as "surgeon.verify(model, small, plan, example_inputs)".
        given: by name, each with the kind that stands there.

    Raises:
        InputError: see above.
    """
    for name, (value, kind) in given.items():
        if not kind.fits(value):
            elsewhere = [
                other
                for other, (item, own) in given.items()
                if other != name and kind.fits(item) and not own.fits(item)
            ]
            raise InputError(
                f"{name} is {said(value)}, not {kind.said}",
                where=call,
                why=f"{kind.said} stands at {elsewhere[0]}: the order differs" if elsewhere else "",
                fix=f"write it so: {call}" if elsewhere else kind.how,
            )


def said(value: Any) -> str:
    """A value in a message: what it is, not what it holds."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
