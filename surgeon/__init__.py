"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them physically, prove it.
"""

from surgeon.bench import bench
from surgeon.doctor import doctor
from surgeon.export import export
from surgeon.fuse import fuse
from surgeon.iterate import iterate
from surgeon.pipeline import Surgery, inspect, shrink
from surgeon.plan import Plan
from surgeon.quantize import quantize
from surgeon.store import load, save
from surgeon.verify import Proof, verify

__all__ = [
    "Plan", "Proof", "Surgery", "bench", "doctor", "export", "fuse", "inspect", "iterate", "load", "quantize", "save", "shrink",
    "verify",
]  # fmt: skip
