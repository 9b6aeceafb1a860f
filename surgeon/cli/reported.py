"""Errors, warnings and signals of a command, said as a shell user knows them: one message, and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer

from surgeon.errors import SurgeonError
from surgeon.selection.options import OPTIONS

_INPUTS = "--input or --data"
_WORDS = {"example_inputs": _INPUTS, "batches": "--data", "calibration": "--data"}
_FLAGS = {
    "reduce_range=False": "--full-range",
    "reduce_range=True": "--reduce-range",
    "dynamic_batch=False": "--input",
}
_NAMED = re.compile(rf"\b({'|'.join((*OPTIONS, 'ratio', 'outputs'))})=(\[[^\]]*\]|[^\s,;)]+)")


class TerminatedError(BaseException):
    """The process was asked to end (SIGTERM): what is not finished is removed first."""

    asked = False  # libraries may catch it on its way


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Surgeon's own errors become a red message and exit code 1, its warnings lines on stderr.

    So does what a user's model raises to end the program: it ends with an error, whatever code it asked for.
    """
    before = warnings.showwarning
    warnings.showwarning = _shown(before)
    try:
        yield
    except SurgeonError as error:
        if TerminatedError.asked:
            raise TerminatedError from None
        say(in_the_shell(str(error)), style="red")
        raise typer.Exit(1) from error
    except SystemExit as error:
        say(
            f"the model's code ended the program: sys.exit({error.code!r})\n  do: let it raise an error, or return",
            style="red",
        )
        raise typer.Exit(1) from error
    finally:
        warnings.showwarning = before


def say(text: str, style: str = "") -> None:
    """A line on stderr; where that cannot be written, nothing is lost but the line."""
    from rich.console import Console
    from rich.text import Text

    with contextlib.suppress(OSError, ValueError):
        Console(stderr=True).print(Text(text, style=style), soft_wrap=True)


def note(text: str) -> None:
    """A remark on stderr."""
    say(f"note: {in_the_shell(text)}")


def in_the_shell(text: str) -> str:
    """A message of the library with arguments as options: `round_to=1` is `--round-to 1`."""
    for said, option in _FLAGS.items():
        text = text.replace(said, option)
    text = _NAMED.sub(_option, text)
    for name, option in _WORDS.items():
        text = re.sub(rf"\b{name}=(\.\.\.|\[[^\]]*\]|\w+)?", option, text)
    return text


def _option(found: re.Match[str]) -> str:
    name, value = found[1].replace("_", "-"), found[2]
    items = re.findall(r"'([^']*)'", value) if value.startswith("[") else [value.strip("'\"")]
    return " ".join(f"--{name} {item}" for item in items or ["..."])


def _shown(before: Callable[..., None]) -> Callable[..., None]:
    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("surgeon."):
            say(f"warning: {in_the_shell(str(message))}", style="yellow")
        else:
            before(message, category, *where, **more)

    return show


def run(app: Callable[[], None]) -> None:
    """Run a command line; a full disk behind stdout, or a request to end, is no traceback."""

    def stop(*_: Any) -> None:
        TerminatedError.asked = True
        raise TerminatedError

    with contextlib.suppress(ValueError):  # another thread runs it
        signal.signal(signal.SIGTERM, stop)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        say(f"cannot write to stdout: {error.strerror}", style="red")
        _drop_stdout()
        raise SystemExit(1) from None
    except TerminatedError:
        say("terminated: what was not finished is removed", style="red")
        raise SystemExit(128 + signal.SIGTERM) from None


def _drop_stdout() -> None:
    """What is left in stdout's buffer goes nowhere, so that the interpreter's end does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
