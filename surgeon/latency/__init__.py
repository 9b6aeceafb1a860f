"""Shapes of products under a choice -> predicted and measured milliseconds, for budgets of latency."""

from surgeon.latency.predict import LatencyTable, Predictor
from surgeon.latency.search import Stopwatch, search

__all__ = ["LatencyTable", "Predictor", "Stopwatch", "search"]
