"""All that is known of ATen ops: what each does to ids, and what it computes when entries are gone. One file
a family.

A rule takes a `OpContext` (one op of a recorded graph) and returns the `ValueIds` of its output, or a tuple of
them. Importing this package
registers every rule; an op that has none is opaque: it freezes what it touches, and the reason names it.
"""

from surgeon.ops import contraction, elementwise, factory, indexing, movement, reduction
from surgeon.ops.table import Family, OpContext, family, opaque, rule_of

__all__ = [
    "Family",
    "OpContext",
    "contraction",
    "elementwise",
    "factory",
    "family",
    "indexing",
    "movement",
    "opaque",
    "reduction",
    "rule_of",
]
