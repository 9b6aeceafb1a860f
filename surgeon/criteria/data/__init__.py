"""Batches of data -> what criteria and recovery read of them: activations, gradients, second moments."""

from surgeon.criteria.data.evidence import Evidence
from surgeon.criteria.data.gather import NEEDS, WIDEST, Loss, gather
from surgeon.criteria.data.stand_ins import output_energy, output_probe

__all__ = ["NEEDS", "WIDEST", "Evidence", "Loss", "gather", "output_energy", "output_probe"]
