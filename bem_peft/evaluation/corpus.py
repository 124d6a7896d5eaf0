"""Corpus metrics (BLEU, chrF) compared from what each sentence contributes to them.

A corpus score is no mean of sentence scores: it is computed from sums of counts. The counts of each sentence are taken
once; a resample only adds them up again.

Source: Koehn, Statistical significance tests for machine translation evaluation, 2004 (bootstrap); Riezler and Maxwell,
On some pitfalls in automatic evaluation and significance testing for MT, 2005 (approximate randomisation). Both as in
sacrebleu's `significance`, whose counts and scores these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class CorpusScore(Protocol):
    score: float


class CorpusMetric(Protocol):
    """What is used of sacrebleu's metrics."""

    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[list[float]]: ...

    def _compute_score_from_stats(self, stats: list[float]) -> CorpusScore: ...


def sentence_counts(metric: CorpusMetric, hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The counts of each sentence, (N, S), of a sacrebleu metric (`BLEU()`, `CHRF()`) with one reference each.

    Raises:
        ValueError: other numbers of hypotheses and references, or none.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references: must be as many, and some.")
    return np.array(metric._extract_corpus_statistics(list(hypotheses), [list(references)]), dtype=np.float64)


def corpus_score(metric: CorpusMetric, counts: np.ndarray) -> float:
    """The corpus score of summed counts, (S,) or of sentences (N, S)."""
    total = counts if counts.ndim == 1 else counts.sum(0)
    return float(metric._compute_score_from_stats(total.tolist()).score)


def pseudo_values(metric: CorpusMetric, counts: np.ndarray) -> np.ndarray:
    """One value a sentence, (N,), whose mean is the corpus score s:  s + (N - 1) (mean_j s_without_j - s_without_i).

    The jackknife's pseudo-values, moved to the score itself, so that their spread tells the score's. With them
    `compare_means` gives a corpus metric the two-way interval over seeds and sentences.
    """
    total, whole, n = counts.sum(0), corpus_score(metric, counts), len(counts)
    without = np.array([corpus_score(metric, total - row) for row in counts])
    found: np.ndarray = whole + (n - 1) * (without.mean() - without)
    return found


def paired_bootstrap(
    metric: CorpusMetric,
    a: np.ndarray,
    b: np.ndarray,
    *,
    resamples: int = 1_000,
    random_seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of the corpus scores of counts a and b (N, S) over resampled sentences, one seed each.

    p is two-sided, for the difference being 0, and never 0 itself: (1 + resamples as far from their mean) / (1 + all).
    """
    _check_pair(a, b)
    rng, n = np.random.default_rng(random_seed), len(a)
    observed = corpus_score(metric, a) - corpus_score(metric, b)
    drawn = np.empty(resamples)
    for i in range(resamples):
        weights = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        drawn[i] = corpus_score(metric, weights @ a) - corpus_score(metric, weights @ b)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    extreme = int((np.abs(drawn - drawn.mean()) >= abs(observed)).sum())
    return observed, float(low), float(high), (extreme + 1) / (resamples + 1)


def paired_randomisation(
    metric: CorpusMetric, a: np.ndarray, b: np.ndarray, *, resamples: int = 10_000, random_seed: int = 0
) -> tuple[float, float]:
    """(difference, p): the systems' sentences are exchanged at random; differences at least as large count (>=)."""
    _check_pair(a, b)
    rng = np.random.default_rng(random_seed)
    observed = corpus_score(metric, a) - corpus_score(metric, b)
    total_a, difference = a.sum(0), b - a
    total = a.sum(0) + b.sum(0)
    extreme = 0
    for _ in range(resamples):
        mixed = total_a + rng.integers(0, 2, len(a)).astype(np.float64) @ difference
        extreme += abs(corpus_score(metric, mixed) - corpus_score(metric, total - mixed)) >= abs(observed) - 1e-12
    return observed, (extreme + 1) / (resamples + 1)


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"counts of {a.shape} and {b.shape}: must be (sentences, counts) of the same sentences.")
