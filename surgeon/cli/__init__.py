"""The command line -> calls of the API."""

from surgeon.cli.main import app, main

__all__ = ["app", "main"]
