"""Rules: what each ATen op does to channel ids, one file per family, one registry.

A rule takes a `Site` (one op at work in the graph) and returns the `Axes` of its output, or a tuple of them. Importing this
package registers every rule; an op that has none is opaque: it freezes what it touches and says so.
"""

from surgeon.rules import contraction, elementwise, factory, indexing, movement, reduction
from surgeon.rules.registry import Family, Site, family, opaque, rule_of

__all__ = [
    "Family",
    "Site",
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
