"""What one run of a model did, as plain data (`Graph`), and questions about it."""

from surgeon.graph.graph import Call, Graph, Spec, spec

__all__ = ["Call", "Graph", "Spec", "spec"]
