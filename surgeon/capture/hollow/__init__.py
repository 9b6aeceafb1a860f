"""Runs in which nobody computes the numbers: shapes and the order of ops are all that a record needs of most."""
