"""Folds: which ops of a recorded model its layers can take into their weights, one module per kind, and how it is done.

`owners` says which layers may be changed, `channels` follows a layer's channels through views, `affine` does the arithmetic in
float64, `forward` takes an op out of the code that runs it. A fold is found on the recorded graph (`Fold`) and made on a copy.
"""

from surgeon.folding.found import Fold, Site

__all__ = ["Fold", "Site"]
