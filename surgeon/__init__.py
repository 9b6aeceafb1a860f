"""surgeon: a structural graph-surgery compiler for PyTorch.

Record a model, find the channels, filters, neurons and heads that must leave together, remove them
physically, prove it. Names are imported when they are used first.
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from surgeon.api.compact import Compaction, compact
    from surgeon.api.iterate import iterate
    from surgeon.api.pipeline import inspect, shrink
    from surgeon.api.sparsify import sparsify
    from surgeon.api.surgery import Surgery
    from surgeon.api.vocabulary import Vocabulary, vocabulary
    from surgeon.capture.inputs import Calls
    from surgeon.cut.broadcast import broadcast_plan
    from surgeon.cut.plan import Plan
    from surgeon.cut.store import load, save
    from surgeon.fusion.fuse import fuse
    from surgeon.masks.sparsify import finalize
    from surgeon.masks.table import sparsity
    from surgeon.onnx.export import export
    from surgeon.onnx.quantization.quantize import quantize
    from surgeon.proof.result import Proof
    from surgeon.proof.verify import verify
    from surgeon.recovery.recover import Recovery, recover
    from surgeon.timing.bench import bench
    from surgeon.timing.doctor import doctor
    from surgeon.training.finetune import finetune
    from surgeon.training.regularize import regularizer

__version__ = "0.1.0"
__all__ = [
    "Calls", "Compaction", "Plan", "Proof", "Recovery", "Surgery", "Vocabulary", "bench", "broadcast_plan", "compact",
    "doctor", "export", "finalize", "finetune", "fuse", "inspect", "iterate", "load", "quantize", "recover", "regularizer",
    "save", "shrink", "sparsify", "sparsity", "verify", "vocabulary",
]  # fmt: skip

_MODULES = {
    "api.compact": "Compaction compact",
    "api.iterate": "iterate",
    "api.pipeline": "inspect shrink",
    "api.sparsify": "sparsify",
    "api.surgery": "Surgery",
    "api.vocabulary": "Vocabulary vocabulary",
    "capture.inputs": "Calls",
    "cut.broadcast": "broadcast_plan",
    "cut.plan": "Plan",
    "cut.store": "load save",
    "fusion.fuse": "fuse",
    "masks.sparsify": "finalize",
    "masks.table": "sparsity",
    "onnx.export": "export",
    "onnx.quantization.quantize": "quantize",
    "proof.verify": "Proof verify",
    "recovery.recover": "Recovery recover",
    "timing.bench": "bench",
    "timing.doctor": "doctor",
    "training.finetune": "finetune",
    "training.regularize": "regularizer",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in _HOME:
        found: object = getattr(_import_module(f"surgeon.{_HOME[name]}"), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and _find_spec(f"surgeon.{name}") is not None:
        return _import_module(f"surgeon.{name}")
    raise AttributeError(f"module 'surgeon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
