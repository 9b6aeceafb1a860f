"""Groups, scores and a request -> the choice of what is removed, with its exact cost."""

from surgeon.selection.choose import Costs, choose
from surgeon.selection.cost import Choice, ShapeModel
from surgeon.selection.options import PlanOptions, Request

__all__ = ["Choice", "Costs", "PlanOptions", "Request", "ShapeModel", "choose"]
