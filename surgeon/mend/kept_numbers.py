"""kept_numbers(small, wrong, look) -> edits: where code makes a number of a layer's own width (`items.embedding_dim ** 0.5`)
and the number must stay, the old width takes the place of that one use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from surgeon.errors import MendError
from surgeon.graph.source_code import methods_as_written, uses
from surgeon.mend.apply_edits import apply_edit, undo_edits
from surgeon.mend.checking.constants import Constant
from surgeon.mend.checking.size_check import Findings
from surgeon.mend.edits import Edit


def kept_numbers(small: nn.Module, wrong: Sequence[Constant], look: Callable[[], Findings]) -> list[Edit]:
    """Edits after which numbers are what they were; they are made in `small`.

    Args:
        wrong: numbers that changed with a width, and should not have.
        look: runs the model as it is now.
    """
    made: list[Edit] = []
    for constant in wrong:
        for edit in _candidates(small, constant):
            if _helps(small, edit, constant, look):
                made.append(edit)
                break
    return made


def _helps(small: nn.Module, edit: Edit, constant: Constant, look: Callable[[], Findings]) -> bool:
    try:
        apply_edit(small, edit)
    except MendError:
        return False
    try:
        now = look()
        still = any((c.node, c.argument) == (constant.node, constant.argument) for c in now.constants)
        right = not now.notes and not still
    except MendError:  # it leads the code astray
        right = False
    if not right:
        undo_edits(small, [edit])
    return right


def _candidates(small: nn.Module, constant: Constant) -> Iterator[Edit]:
    """The names of whole numbers on the line, each with what it may have been: the number is as many times smaller, or
    its root or inverse is.
    """
    source = None if constant.node is None else constant.node.meta.get("source")
    if source is None or not constant.before or not constant.after:
        return
    times = abs(constant.before / constant.after)
    module = small.get_submodule(constant.module)
    for name, method in methods_as_written(module).items():
        for use in uses(method, module):
            hidden = any(part.startswith("__") for part in use.text.split("."))
            if (use.file, use.line) != source or not use.value or use.value < 0 or hidden:
                continue
            for factor in (times, times**2, 1 / times, 1 / times**2):
                old = round(use.value * factor)
                if old > use.value and abs(old - use.value * factor) < 1e-6 * old:
                    yield Edit(constant.module, "use", f"{name}:{use.which}:{use.text}", use.value, old)
