"""The stages in order: what users call."""

from surgeon.api.iterate import iterate
from surgeon.api.pipeline import inspect, shrink
from surgeon.api.surgery import Surgery

__all__ = ["Surgery", "inspect", "iterate", "shrink"]
