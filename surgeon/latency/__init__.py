"""Choices -> predicted and measured milliseconds, for budgets of latency."""

from surgeon.latency.predict import LatencyTable, Predictor
from surgeon.latency.search import timed

__all__ = ["LatencyTable", "Predictor", "timed"]
