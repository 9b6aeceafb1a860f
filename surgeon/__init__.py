"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them physically, prove it.
"""

from surgeon.bench import bench
from surgeon.distributed import broadcast_plan
from surgeon.export import export
from surgeon.fuse import fuse
from surgeon.iterate import iterate
from surgeon.pipeline import Surgery, inspect, shrink
from surgeon.plan import Plan
from surgeon.store import load, save
from surgeon.training import finetune, regularizer
from surgeon.verify import Proof, verify

__all__ = [
    "Plan", "Proof", "Surgery", "bench", "broadcast_plan", "export", "finetune", "fuse", "inspect", "iterate", "load",
    "regularizer", "save", "shrink", "verify",
]  # fmt: skip
