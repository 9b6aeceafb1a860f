"""Sizes during a run: where each comes from, and which dims must keep the same share."""
