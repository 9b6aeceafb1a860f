"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them physically, prove it.
"""

from surgeon.bench import bench
from surgeon.distributed import broadcast_plan
from surgeon.doctor import doctor
from surgeon.export import export
from surgeon.fuse import fuse
from surgeon.iterate import iterate
from surgeon.pipeline import inspect, shrink
from surgeon.plan import Plan
from surgeon.quantize import quantize
from surgeon.recovery import Recovery, recover
from surgeon.store import load, save
from surgeon.surgery import Surgery
from surgeon.training import finetune, regularizer
from surgeon.verify import Proof, verify

__all__ = [
    "Plan", "Proof", "Recovery", "Surgery", "bench", "broadcast_plan", "doctor", "export", "finetune", "fuse", "inspect",
    "iterate", "load", "quantize", "recover", "regularizer", "save", "shrink", "verify",
]  # fmt: skip
