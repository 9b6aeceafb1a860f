"""A small model whose code holds old sizes -> edits of those numbers."""

from surgeon.mend.apply_edits import apply_edit
from surgeon.mend.edits import Edit
from surgeon.mend.mend import find_edits

__all__ = ["Edit", "apply_edit", "find_edits"]
