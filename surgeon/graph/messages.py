"""Where an op stands, for messages: its module and the line of the user's code."""

from __future__ import annotations

import linecache
import os

from torch import fx


def raised(error: BaseException) -> str:
    """`Kind: text` of an error of a user's code, whose text may be code that fails as well."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  # whatever `__str__` does
        return type(error).__name__


def where(node: fx.Node) -> str:
    """`op` in `module path` at `file:line: code`, for messages."""
    name = (
        str(node.target).removesuffix(".default")
        if node.op == "call_function"
        else f"{node.op} {node.target}"
    )
    module = node.meta.get("module", "")
    text = f"{name} in module '{module}'" if module else name
    line = source_line(node.meta.get("source"))
    return f"{text} at {line}" if line else text


def source_line(source: tuple[str, int] | None) -> str:
    """`file:line: code` of a (file, line) pair, with a short file name."""
    if source is None:
        return ""
    path, line = source
    code = linecache.getline(path, line).strip()
    short = os.sep.join(path.split(os.sep)[-2:])
    return f"{short}:{line}" + (f": {code}" if code else "")
