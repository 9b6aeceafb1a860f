"""Groups, scores and a request -> `Selection`: what stays, with its exact cost."""

from surgeon.selection.options import PlanOptions

__all__ = ["PlanOptions"]
