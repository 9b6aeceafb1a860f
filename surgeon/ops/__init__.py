"""All that is known of ATen ops: what each does to ids, and what it computes when entries are gone. One file a family.

A rule takes an `OpContext` (one op of a recorded graph) and returns the `ValueIds` of its output, or a tuple of them.
Importing this package declares every op; one that is not declared is opaque: it freezes what it touches, and the reason
names it. `op` declares a further one.
"""

from surgeon.ops import (
    attention,
    contraction,
    elementwise,
    indexing,
    movement,
    normalisation,
    reduction,
    reshape,
    slicing,
    window,
)
from surgeon.ops.table import Family, op

__all__ = [
    "Family",
    "attention",
    "contraction",
    "elementwise",
    "indexing",
    "movement",
    "normalisation",
    "op",
    "reduction",
    "reshape",
    "slicing",
    "window",
]
