"""`StatisticalValidator`: one door to the comparisons of two systems, with one setting of confidence and correction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bem_peft.evaluation.exact_tests import mcnemar_p_value
from bem_peft.evaluation.intervals import Comparison, compare_means
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.planning import required_items
from bem_peft.evaluation.scores import Scores
from bem_peft.evaluation.slices import DEVELOPMENT, SliceResult, compare_slices, slice_b_analysis


@dataclass(frozen=True)
class StatisticalValidator:
    """Comparisons with these settings.

    Args:
        confidence: of every interval. correction: over metrics and slices, "by", "bh" or "holm".
        margin: how much worse counts as no worse, in the metric's units.
        power: for the smallest effect that a design finds, and for how many items one needs.
    """

    confidence: float = 0.95
    correction: str = "by"
    margin: float = 0.0
    power: float = 0.8

    def compare(self, candidate: Scores, anchor: Scores) -> Comparison:
        """The mean paired difference on all items. Raises ValueError where the scores cannot be paired."""
        pair = PairedScores(candidate, anchor)
        return compare_means(pair.difference, pair.cluster_index, confidence=self.confidence, power=self.power)

    def compare_on_slices(
        self, pairs: Mapping[str, PairedScores], *, stands_on: str = DEVELOPMENT
    ) -> list[SliceResult]:
        """Every metric on every slice, corrected."""
        return compare_slices(pairs, stands_on=stands_on, **self._options())

    def slice_b_analysis(
        self, development: Mapping[str, PairedScores], held_out: Mapping[str, PairedScores]
    ) -> list[SliceResult]:
        """Slice-A and Slice-B, after it is sure that no item stands in both."""
        return slice_b_analysis(development, held_out, **self._options())

    def required_items(self, candidate: Scores, anchor: Scores, effect: float, seeds: int | None = None) -> int | None:
        """Items that find a true difference of `effect`; None: the seeds hide it, add seeds."""
        pair = PairedScores(candidate, anchor)
        return required_items(
            pair.difference, effect, pair.cluster_index, seeds=seeds, confidence=self.confidence, power=self.power
        )

    def mcnemar(self, candidate: Scores, anchor: Scores) -> float:
        """The exact test of binary scores on one seed. Raises ValueError for several seeds or other scores."""
        pair = PairedScores(candidate, anchor)
        if len(pair.a.seeds) != 1:
            raise ValueError(f"{len(pair.a.seeds)} seeds: McNemar's test is for one; use `compare`.")
        order = {item: i for i, item in enumerate(pair.b.items)}
        other: np.ndarray = pair.b.values[0][[order[item] for item in pair.a.items]]
        return mcnemar_p_value(pair.a.values[0], other)

    def _options(self) -> dict[str, Any]:
        return {"confidence": self.confidence, "correction": self.correction, "margin": self.margin}
