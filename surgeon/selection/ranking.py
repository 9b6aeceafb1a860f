"""Ranking: the steps of several linked groups from the lowest score to the highest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgeon.selection.linked_groups import LinkedGroups


class Ranking:
    """What leaves first; the steps of one of the linked groups leave in their own order."""

    def __init__(self, linked_groups: Sequence[LinkedGroups]) -> None:
        scores = [
            np.maximum.accumulate(linked.score)[: max(linked.steps - linked.kept, 0)]
            for linked in linked_groups
        ]
        number = np.repeat(np.arange(len(scores)), [len(score) for score in scores])
        order = np.argsort(np.concatenate(scores).astype(np.float64), kind="stable")
        widths = np.asarray([linked.width for linked in linked_groups])
        self._count, self._number = len(scores), number[order]
        self._total = float((widths * [linked.steps for linked in linked_groups]).sum())
        taken = widths[self._number]
        self._middle = np.cumsum(taken) - taken / 2  # channels that are gone when half of a step is

    def lowest(self, ratio: float) -> list[int]:
        """Steps that leave each if the lowest scores of all do, up to this share of their channels."""
        beyond = self._middle > ratio * self._total
        end = int(np.argmax(beyond)) if beyond.any() else len(self._number)
        found: list[int] = np.bincount(self._number[:end], minlength=self._count).tolist()
        return found
