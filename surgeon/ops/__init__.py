"""All that is known of ops: what each does to ids, and what it computes when entries are gone; see `families`.

A rule takes an `OpContext` (one op of a recorded graph) and returns the `ValueIds` of its output, or a tuple of them. Importing
this package declares every op; one that is not declared is opaque: it freezes what it touches, and the reason names it. `op`
declares a further one, `attention` one that is attention in one op.
"""

from surgeon.ops import families
from surgeon.ops.families.attention import attention
from surgeon.ops.table import Family, op

__all__ = ["Family", "attention", "families", "op"]
