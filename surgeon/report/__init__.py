"""What surgeon found or did -> text for people."""

from surgeon.report.text import describe

__all__ = ["describe"]
