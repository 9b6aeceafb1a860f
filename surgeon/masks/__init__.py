"""Masks: a model with masks or zeros -> the channels that change nothing, what their constants leave behind, a small model."""

from surgeon.masks.signals import Signals

__all__ = ["Signals"]
