"""A choice -> a `Plan`; a plan and a model -> a physically smaller model, with its optimizer, on disk or on
all ranks.
"""

from surgeon.cut.broadcast import broadcast_plan
from surgeon.cut.plan import Plan, check_fit
from surgeon.cut.slice import shrink_module
from surgeon.cut.store import load, save

__all__ = ["Plan", "broadcast_plan", "check_fit", "load", "save", "shrink_module"]
