"""Proof: how far a small model is from what the cut original should compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from surgeon.proof.reference import TOLERANCE
from surgeon.proof.rounding import FACTOR


@dataclasses.dataclass(frozen=True)
class Proof:
    """How far the small model is from the masked reference.

    Attributes:
        errors: max |small - reference| / max |reference| in float64, per output.
        inner: the same, the largest over the results of all contractions (convolutions, matrix products,
            attention). It counts where an output hides what happened before it, as a classifier that was
            initialised to zero does.
        compared: how many contractions were compared; 0 if the two runs do not line up op by op.
        tolerance: the error up to which the cut counts as right, the largest one where values have limits of
            their own: 1e-9, more where rounding alone moves the original so far.
        rescaled: numbers of the model's code that follow a width, such as 1/sqrt(head_dim): (place, before,
            after). Each scales a sum over a dim that lost such a share of its entries (or the root of it).
            The reference uses the value after the cut.
        hidden: channels that carried nothing wherever a contraction read them (zeros, or one number that
            others carry as well), so that nothing shows whether they are the right ones.
        unread: tensors that were cut and of which no run of the proof shows anything: nothing reads them, or
            what does reaches no output and no product.
        hidden_at: how many of the hidden channels each value has.
    """

    errors: Mapping[str, float]
    tolerance: float
    inner: float = 0.0
    compared: int = 0
    rescaled: tuple[tuple[str, float, float], ...] = ()
    hidden: int = 0
    unread: tuple[str, ...] = ()
    hidden_at: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest error of all outputs and inner results."""
        return max(*self.errors.values(), self.inner)

    @property
    def not_shown(self) -> tuple[str, ...]:
        """What the proof could not show, in sentences."""
        said = []
        if self.hidden:
            where = ", ".join(f"{place} ({count})" for place, count in self.hidden_at.items())
            said.append(f"{self.hidden} channels were zero throughout, which shows nothing of them: {where}")
        if self.unread:
            said.append(f"nothing is shown of tensors that no run read: {', '.join(self.unread)}")
        return tuple(said)

    def __str__(self) -> str:
        text = f"proof: max relative error {self.error:.1e} in float64"
        text += f" over {len(self.errors)} outputs and {self.compared} products"
        if self.tolerance > TOLERANCE:
            text += f" (allowed {self.tolerance:.0e}: {FACTOR} times what rounding changes in the original)"
        if self.rescaled:
            text += f"; {len(self.rescaled)} width-dependent constants follow the new widths"
        return "; ".join((text, *self.not_shown))
