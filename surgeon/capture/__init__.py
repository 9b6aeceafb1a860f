"""A model and example inputs -> the `Graph` of one run, or of all `Runs` that count; the model is left as it was."""

from surgeon.capture.capture import capture
from surgeon.capture.inputs import Calls, find_inputs, normalize
from surgeon.capture.runs import Runs, record_runs

__all__ = ["Calls", "Runs", "capture", "find_inputs", "normalize", "record_runs"]
