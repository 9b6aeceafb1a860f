"""Original, small model, plan, batches without labels -> the small model with weights that bring its outputs
back.
"""

from surgeon.recovery.layerwise import Fit
from surgeon.recovery.recover import DEFAULT, STEPS, Recovery, Step, batches_of, check_steps, recover

__all__ = ["DEFAULT", "STEPS", "Fit", "Recovery", "Step", "batches_of", "check_steps", "recover"]
