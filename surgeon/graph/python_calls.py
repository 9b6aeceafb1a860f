"""Names of functions and methods of a model's Python code, by what they compute; `surgeon.ops` knows the ops that they run.

Code that is read or traced before it runs, and calls that torch hands to a mode, show such names.
"""

from __future__ import annotations

VIEWS = frozenset(("view", "reshape"))
RESHAPES = frozenset((*VIEWS, "unflatten"))
REPEATS = frozenset(("expand", "repeat", "expand_as"))
SPLITS = frozenset(("split", "split_with_sizes"))
PARTS = {
    "split": 2,
    "chunk": 2,
    "unbind": 1,
}  # the argument that is the dim; its size says how many parts there are

# Calls whose arguments hold the sizes of an op: its name -> theirs. An op that is not here is called by its own name.
CALLED = {
    "view": (*RESHAPES, "flatten"),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "constant_pad_nd": ("pad", "_pad"),
    "slice": ("getitem", "setitem", "narrow"),
    "split": ("split", "chunk"),
}

NORMALISES = frozenset(("batch_norm",))
SCALES = frozenset(("mul", "mul_", "imul", "multiply", "div", "div_", "truediv", "itruediv"))
ADDS = frozenset(("add", "add_", "iadd"))
SHIFTS = frozenset((*ADDS, "sub", "sub_", "isub", "rsub"))
COMPUTES_SIZES = frozenset(("mul", "floordiv"))

# torch makes these ops of others or leaves them out, by the mode that a module is in
DROPOUTS = frozenset(
    f"{kind}{end}"
    for kind in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
    for end in ("", "_")
)  # fmt: skip
