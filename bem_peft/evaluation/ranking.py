"""Systems in their order under one metric: how probably each is the best, and which of them are not told apart.

    mean rank of a system  =  mean over items of the rank of its mean over seeds, 1 is best, ties share theirs

A group is a run of systems, neighbours by mean rank, of which no two differ surely: by the two-way interval over seeds
and items, Holm's correction over all pairs.

Source: Demsar, Statistical comparisons of classifiers over multiple data sets, 2006 (the diagram of critical
differences; its rank test would take the items of one seed for all there is to know).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from bem_peft.evaluation.intervals import compare_means, too_few
from bem_peft.evaluation.multiplicity import adjusted_p_values
from bem_peft.evaluation.paired import PairedScores
from bem_peft.evaluation.resampling import on_shared_items, resampled_means
from bem_peft.evaluation.scores import Scores

MOST_SYSTEMS = 20  # whose pairs are all compared


@dataclass(frozen=True)
class Ranking:
    """Under `metric`. probability_best: system -> share of the joint resamples of seeds and items in which its mean is
    the best. mean_ranks: system -> mean rank, best first. groups: runs of systems that are not told apart."""

    metric: str
    probability_best: dict[str, float]
    mean_ranks: dict[str, float]
    groups: tuple[tuple[str, ...], ...]


def rank_systems(scores: Sequence[Scores], confidence: float = 0.95) -> Ranking | None:
    """The ranking of systems scored by one metric on the same seeds and items; None where they were not."""
    draws = resampled_means(scores)
    if len(scores) < 2 or draws is None:
        return None
    names = [found.system for found in scores]
    sign = 1.0 if scores[0].higher_is_better else -1.0
    best = sign * draws == (sign * draws).max(0)
    chances = (best / best.sum(0)).mean(1)
    ranks = stats.rankdata(-sign * on_shared_items(scores).mean(1), axis=0).mean(1)
    order = np.argsort(ranks, kind="stable")[:MOST_SYSTEMS]
    return Ranking(
        scores[0].metric, {name: float(p) for name, p in zip(names, chances, strict=True)},
        {names[i]: float(ranks[i]) for i in order}, _groups([scores[i] for i in order], confidence),
    )  # fmt: skip


def _groups(ordered: Sequence[Scores], confidence: float) -> tuple[tuple[str, ...], ...]:
    p_values: dict[tuple[int, int], float] = {}
    for i, j in combinations(range(len(ordered)), 2):
        pair = PairedScores(ordered[i], ordered[j])
        if too_few(pair.difference, pair.cluster_index) is None:
            found = compare_means(pair.difference, pair.cluster_index, confidence=confidence)
            if found.may_claim:
                p_values[i, j] = found.claim_p_value
    sure = {pair for pair, p in adjusted_p_values(p_values, "holm").items() if p <= 1.0 - confidence}
    groups: list[tuple[int, int]] = []
    for first in range(len(ordered)):
        last = first
        while last + 1 < len(ordered) and not any((i, last + 1) in sure for i in range(first, last + 1)):
            last += 1
        if last > first and not any(a <= first and last <= b for a, b in groups):
            groups.append((first, last))
    return tuple(tuple(found.system for found in ordered[a : b + 1]) for a, b in groups)
