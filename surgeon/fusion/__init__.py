"""A model -> a copy whose layers have taken in the ops next to them (batch norm and kin), in float64
arithmetic.
"""

from surgeon.fusion.fuse import FoldReport, folds, fuse, plans_of

__all__ = ["FoldReport", "folds", "fuse", "plans_of"]
