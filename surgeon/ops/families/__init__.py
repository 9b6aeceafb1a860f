"""Rules and meanings, one file a family of ops. Importing this package declares all of them."""

from surgeon.ops.families import (
    attention,
    contraction,
    convolution,
    elementwise,
    factory,
    normalisation,
    reduction,
    window,
)
from surgeon.ops.families.moves import diagonal, indexing, movement, reshape, slicing

FAMILIES = (
    attention, contraction, convolution, diagonal, elementwise, factory, indexing, movement, normalisation, reduction,
    reshape, slicing, window,
)  # fmt: skip
