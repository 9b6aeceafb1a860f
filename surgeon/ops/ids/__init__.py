"""Channel ids: integers on the entries of values, and the `Constraints` on what must be removed together.

A value carries `ValueIds`: for each of its dims that can shrink its `DimIds`, an integer array that is
broadcastable to the value's shape, full along that dim, and gives the id of every entry. A dim without ids is
fixed. The ids of a dim may also vary along other dims, its *rows*: in a value of heads x head_dim the ids of
the second dim may differ from head to head, and then every row must lose equally many entries so that what
stays is rectangular.

Constraints are facts, collected without a comparison of ids; `solve` draws all conclusions at once:

- joins:    a and b are removed together.
- freezes:  a may not be removed, with the reason.
- parts:    p is removed if and only if row or column is (p is a cell of a grid, or an index of a flattened
  outer product).
- balances: a matrix of ids of which every row keeps equally many.
- shares:   ids that keep the same share as others: the model's code computes how many there are from how many
  others there are.
- unowned:  ids of padding and expanded dims: each is removed with whatever it is joined to, and stays if it is
  summed or normalised over, because it matters how many there are.
- batched:  ids of rows that an op computes one by one (heads, groups).
- read:     ids that an op computes with; others of a tensor were only cut off (a table that is longer than
  the input).
- dims:     the ids of the dims of values: something must stay of each.
- heads, head_dims: ids that batched products of activations compute one by one, or sum over and give
  (attention).
"""

from surgeon.ops.ids.constraints import Constraints
from surgeon.ops.ids.facts import DimIds, Freeze, ValueIds, varies

__all__ = ["Constraints", "DimIds", "Freeze", "ValueIds", "varies"]
