"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them
physically, prove it.
"""

from surgeon.api.iterate import iterate
from surgeon.api.pipeline import inspect, shrink
from surgeon.api.surgery import Surgery
from surgeon.capture.inputs import Calls
from surgeon.cut.broadcast import broadcast_plan
from surgeon.cut.plan import Plan
from surgeon.cut.store import load, save
from surgeon.fusion.fuse import fuse
from surgeon.onnx.export import export
from surgeon.onnx.quantize import quantize
from surgeon.proof.verify import Proof, verify
from surgeon.recovery.recover import Recovery, recover
from surgeon.timing.bench import bench
from surgeon.timing.doctor import doctor
from surgeon.training import finetune, regularizer

__all__ = [
    "Calls", "Plan", "Proof", "Recovery", "Surgery", "bench", "broadcast_plan", "doctor", "export", "finetune", "fuse", "inspect",
    "iterate", "load", "quantize", "recover", "regularizer", "save", "shrink", "verify",
]  # fmt: skip
