"""Training before, while and after cutting: fine-tuning with a teacher, regularizers over units, clipping,
schedules, averages.

`finetune` and `regularizer` put the parts together; each also serves a loop of your own (docs/training.md).
"""

from surgeon.training.evaluate import accuracy
from surgeon.training.features import Features, blocks
from surgeon.training.finetune import Epoch, Training, finetune
from surgeon.training.gates import Gates
from surgeon.training.losses import Distillation, soft_targets
from surgeon.training.optimization import Average, clip_adaptive, clip_norm, clip_value
from surgeon.training.penalty import Regularizer
from surgeon.training.regularize import regularizer

__all__ = [
    "Average", "Distillation", "Epoch", "Features", "Gates", "Regularizer", "Training", "accuracy", "blocks", "clip_adaptive",
    "clip_norm", "clip_value", "finetune", "regularizer", "soft_targets",
]  # fmt: skip
