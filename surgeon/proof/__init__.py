"""Original, small model, plan -> a `Proof`, or a ProofError; the oracle reads no ids, groups or slices."""

from surgeon.proof.result import Proof
from surgeon.proof.verify import verify

__all__ = ["Proof", "verify"]
