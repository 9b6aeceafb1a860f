"""Tensors made of one repeated constant: their dims follow whatever they meet, so each entry gets an id of
nobody's slot.

Tensors whose entries differ by position (arange, random numbers, eye) are fixed: an entry cannot go without
changing the rest.
"""

from __future__ import annotations

from surgeon.ops.ids import ValueIds
from surgeon.ops.table import Family, Site, rule


@rule(
    Family.FACTORY,
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "empty_strided",
)
def repeated(site: Site) -> ValueIds:
    return unowned_ids(site, site.out, range(len(site.out)))


def unowned_ids(site: Site, shape: tuple[int, ...], dims: object) -> ValueIds:
    """Fresh ids along each of `dims`, tied to nothing."""
    axes: ValueIds = {}
    for dim in dims:  # type: ignore[attr-defined]  # any iterable of ints
        if shape[dim] > 1:
            axes[dim] = site.constraints.new(shape[dim]).reshape(
                [-1 if d == dim else 1 for d in range(len(shape))]
            )
            site.constraints.mark_unowned(axes[dim])
    return axes


@rule(
    Family.FACTORY, "arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm", "scalar_tensor",
    "tril_indices", "triu_indices", "hann_window",
)  # fmt: skip
def fixed(site: Site) -> ValueIds:
    return {}
