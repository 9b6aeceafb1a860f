"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them physically, prove it.
"""

from surgeon.bench import bench
from surgeon.export import export
from surgeon.fuse import fuse
from surgeon.iterate import iterate
from surgeon.pipeline import inspect, shrink
from surgeon.plan import Plan
from surgeon.store import load, save
from surgeon.surgery import Surgery
from surgeon.verify import Proof, verify

__all__ = ["Plan", "Proof", "Surgery", "bench", "export", "fuse", "inspect", "iterate", "load", "save", "shrink", "verify"]
