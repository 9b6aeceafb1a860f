"""Original, small model, plan, batches without labels -> the small model with weights that bring its outputs
back.
"""

from surgeon.recovery.layerwise import Fit
from surgeon.recovery.options import DEFAULT, STEPS, batches_of, check_steps
from surgeon.recovery.recover import Recovery, Step, recover

__all__ = ["DEFAULT", "STEPS", "Fit", "Recovery", "Step", "batches_of", "check_steps", "recover"]
