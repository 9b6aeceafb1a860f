"""Errors of a command: surgeon's own become a red message and exit code 1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from surgeon.errors import SurgeonError


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Surgeon's own errors become a red message and exit code 1."""
    try:
        yield
    except SurgeonError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        raise typer.Exit(1) from error
