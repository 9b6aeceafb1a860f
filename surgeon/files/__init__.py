"""Files: written whole or not at all, read without pickle and within bounds; libraries kept quiet meanwhile."""

from surgeon.files.drafts import draft_folder, locked, unwritable
from surgeon.files.quiet import silence
from surgeon.files.reading import read_file
from surgeon.files.weights import fill, load_weights, read_weights
from surgeon.files.writing import put, regular_target, sync, write_atomically

__all__ = [
    "draft_folder",
    "fill",
    "load_weights",
    "locked",
    "put",
    "read_file",
    "read_weights",
    "regular_target",
    "silence",
    "sync",
    "unwritable",
    "write_atomically",
]
