"""A model and example inputs -> the `Graph` of one run; the model is left as it was."""

from surgeon.capture.capture import capture, capture_training
from surgeon.capture.inputs import find_inputs, normalize

__all__ = ["capture", "capture_training", "find_inputs", "normalize"]
