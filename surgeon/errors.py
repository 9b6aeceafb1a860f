"""One family of errors. Each says where it happened, why, and what to do about it."""

from __future__ import annotations

import os
import sys
import warnings


class SurgeonError(Exception):
    """Base of every error that surgeon raises on purpose.

    Args:
        what: one sentence that says what went wrong.
        where: the op, module path, tensor or file concerned, with the source line where one is known.
        why: the cause, as far as surgeon knows it.
        fix: what the user can do.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        lines += [
            f"  {label}: {text}" for label, text in (("where", where), ("why", why), ("do", fix)) if text
        ]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def _rebuild(kind: type[SurgeonError], what: str, where: str, why: str, fix: str) -> SurgeonError:
    return kind(what, where=where, why=why, fix=fix)


class SurgeonWarning(UserWarning):
    """Base of every warning that surgeon gives."""


class PathWarning(SurgeonWarning):
    """The model's code can take paths that no recorded run took: nothing is shown of them."""


class ConfigWarning(SurgeonWarning):
    """The model's config cannot say the widths that are left: `save_pretrained` would not round-trip."""


class WidthWarning(SurgeonWarning):
    """Numbers of the model's modules may say a width that is no more, and nothing shows whether they do."""


class BlockWarning(SurgeonWarning):
    """A budget needs narrower blocks than kernels like."""


class AssumedWarning(SurgeonWarning):
    """Example inputs were found, not given."""


class NothingRemovedWarning(SurgeonWarning):
    """What was asked for removes no channel."""


def warn(text: str, kind: type[Warning]) -> None:
    """Warn at the line of the user's that called into surgeon, however deep the caller is."""
    own = os.path.dirname(__file__) + os.sep
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(own)
        or frame.f_code.co_filename.endswith(("contextlib.py", "functools.py"))
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, kind, stacklevel=depth)


class InputError(SurgeonError, ValueError):
    """An argument is missing, out of range or contradicts another one."""


class CaptureError(SurgeonError):
    """The model could not be run and recorded on the example inputs."""


class RuleError(SurgeonError):
    """The rule of an op contradicts what the op gave."""


class BudgetError(SurgeonError, ValueError):
    """The asked ratio or budget cannot be reached on this model."""


class PlanError(SurgeonError, ValueError):
    """A plan is damaged, edited, or belongs to another architecture."""


class CopyError(SurgeonError):
    """The model holds something that leads back to it and cannot be bound to a copy."""


class MendError(SurgeonError):
    """The model's own code holds a size that surgeon could not change.

    Attributes:
        ties: pairs of groups that would have to keep the same share, several ways, the fewest first.
    """

    ties: tuple[tuple[tuple[str, str], ...], ...] = ()


class ProofError(SurgeonError):
    """The small model does not compute what the plan says it should."""


class FuseError(SurgeonError):
    """A fusion was asked for that would not be exact."""


class FileError(SurgeonError, ValueError):
    """An ONNX file is missing, damaged or incomplete, or a path cannot be written."""


class ExportError(SurgeonError):
    """The model could not be exported, or the exported file computes something else."""


class QuantizeError(SurgeonError):
    """A file could not be quantised, or the quantised file does not run."""


class BenchError(SurgeonError):
    """A latency could not be measured."""


class MissingExtraError(SurgeonError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class ProofWarning(UserWarning):
    """What a proof took on trust, or could not show: numbers that follow a width, channels that were zero."""
