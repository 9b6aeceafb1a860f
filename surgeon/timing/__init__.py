"""Modules and ONNX files -> latencies with intervals, and where the time goes."""

from surgeon.timing.bench import bench
from surgeon.timing.doctor import doctor
from surgeon.timing.table import Row, Table

__all__ = ["Row", "Table", "bench", "doctor"]
