"""Corpus metrics against sacrebleu: its scores, and its paired tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from bem_peft.evaluation.corpus import (
    corpus_score,
    paired_bootstrap,
    paired_randomisation,
    pseudo_values,
    sentence_counts,
)
from bem_peft.evaluation.intervals import compare_means

TEXT = "in the beginning was the word and the word was with him and he was good to all of them that came"
WORDS = TEXT.split()


def corpus(errors: float, seed: int, count: int = 60) -> tuple[list[str], list[str]]:
    """References, and hypotheses in which a share of the words is wrong."""
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(count)]
    hypotheses = [" ".join(w if rng.random() > errors else "zzz" for w in text.split()) for text in references]
    return hypotheses, references


@pytest.mark.parametrize("metric", [BLEU(), CHRF()])
def test_score_of_the_summed_counts_is_sacrebleus(metric: Any) -> None:
    hypotheses, references = corpus(0.2, 0)
    counts = sentence_counts(metric, hypotheses, references)
    assert corpus_score(metric, counts) == metric.corpus_score(hypotheses, [references]).score
    half = metric.corpus_score(hypotheses[:30], [references[:30]]).score
    assert corpus_score(metric, counts[:30]) == pytest.approx(half)


@pytest.mark.parametrize("metric", [BLEU, CHRF])
@pytest.mark.parametrize("errors", [0.22, 0.35])
def test_paired_tests_are_sacrebleus(metric: Any, errors: float) -> None:
    (first, references), (second, _) = corpus(0.2, 0), corpus(errors, 0)
    counts = [sentence_counts(metric(), found, references) for found in (second, first)]
    systems = [("baseline", first), ("candidate", second)]
    key = "BLEU" if metric is BLEU else "chrF2"
    options = {"metrics": {key: metric()}, "references": [references]}
    _, by_randomisation = PairedTest(systems, test_type="ar", n_samples=2_000, **options)()
    expected = by_randomisation[key][1]
    observed, p = paired_randomisation(metric(), *counts, resamples=2_000)
    assert observed == pytest.approx(expected.score - by_randomisation[key][0].score, abs=1e-9)
    assert p == pytest.approx(expected.p_value, abs=0.035)
    _, by_bootstrap = PairedTest(systems, test_type="bs", n_samples=1_000, **options)()
    _, low, high, p = paired_bootstrap(metric(), *counts, resamples=1_000)
    assert p == pytest.approx(by_bootstrap[key][1].p_value, abs=0.05)
    assert low < observed < high


def test_identical_systems_are_not_different() -> None:
    counts = sentence_counts(BLEU(), *corpus(0.2, 1))
    assert paired_randomisation(BLEU(), counts, counts, resamples=200) == (0.0, 1.0)
    assert paired_bootstrap(BLEU(), counts, counts, resamples=200) == (0.0, 0.0, 0.0, 1.0)


def test_pseudo_values_carry_a_corpus_metric_to_the_two_way_interval() -> None:
    """Their mean is near the corpus score, and their interval near that of resampled sentences."""
    metric = CHRF()
    hypotheses, references = corpus(0.25, 3, count=150)
    counts = sentence_counts(metric, hypotheses, references)
    values = pseudo_values(metric, counts)
    assert values.mean() == pytest.approx(corpus_score(metric, counts), abs=0.5)
    rng = np.random.default_rng(0)
    drawn = [corpus_score(metric, counts[rng.integers(0, 150, 150)]) for _ in range(1_500)]
    assert values.std(ddof=1) / np.sqrt(150) == pytest.approx(np.std(drawn), rel=0.1)
    seeds = np.stack([pseudo_values(metric, sentence_counts(metric, *corpus(e, 3, 150))) for e in (0.2, 0.25, 0.3)])
    found = compare_means(seeds - values)
    assert found.low < found.estimate < found.high


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 hypotheses for 1 references"):
        sentence_counts(BLEU(), ["a", "b"], ["a"])
    counts = sentence_counts(BLEU(), *corpus(0.2, 1))
    with pytest.raises(ValueError, match="of the same sentences"):
        paired_bootstrap(BLEU(), counts, counts[:-1])
