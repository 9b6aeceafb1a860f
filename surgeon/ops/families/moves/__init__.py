"""Ops that give the same entries in other places, or a part of them."""
