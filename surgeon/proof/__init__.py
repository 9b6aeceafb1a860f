"""Original, small model, plan -> a `Proof`, or a ProofError; the oracle reads no ids, groups or slices."""

from surgeon.proof.verify import Proof, verify

__all__ = ["Proof", "verify"]
