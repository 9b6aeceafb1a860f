"""A module -> an ONNX file that was compared with the module; a file and batches -> an int8 or fp16 file."""

from surgeon.onnx.export import export
from surgeon.onnx.quantization.quantize import quantize

__all__ = ["export", "quantize"]
