"""Metrics of generated text against one reference, item by item.

    exact_match    1 where prediction and reference are the same words                          Rajpurkar et al. 2016
    f1             2 c / (p + r), c common words of p predicted and r reference words           Rajpurkar et al. 2016
    rouge_l        F of the longest common subsequence, without stemming (`rouge-score`)        Lin 2004
    json_validity  1 where the prediction is a JSON document (RFC 8259; NaN and Infinity are none)
    bleu, chrf     counts of each sentence, which add up to the corpus score (`sacrebleu`)   Papineni 2002, Popovic 2015

The first four lie in [0, 1], BLEU and chrF in [0, 100]; higher is better. "The same words": lower case, without
punctuation and the articles a, an, the, as SQuAD's own script counts them. Spaces around a text do not count.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import numpy as np

from bem_peft.evaluation.corpus import CorpusMetric, sentence_counts

LOSS = "nll"
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
CORPUS = ("bleu", "chrf")


def words(text: str) -> list[str]:
    """The words that SQuAD's exact match and F1 compare."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(prediction: str, reference: str) -> float:
    return float(words(prediction) == words(reference))


def f1(prediction: str, reference: str) -> float:
    """1 where both have no words, 0 where one has none."""
    predicted, expected = words(prediction), words(reference)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not predicted or not expected:
        return float(predicted == expected)
    return 2.0 * common / (len(predicted) + len(expected))


def json_validity(prediction: str, reference: str) -> float:
    """Of the prediction alone."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        json.loads(prediction, parse_constant=refuse)
    except ValueError:
        return 0.0
    return 1.0


def rouge_l(prediction: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=False).score(reference, prediction)["rougeL"].fmeasure)


BY_ITEM: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match, "f1": f1, "rouge_l": rouge_l, "json_validity": json_validity,
}  # fmt: skip
GENERATED = (*BY_ITEM, *CORPUS)  # metrics that need generated text


def corpus_metric(name: str) -> CorpusMetric:
    """sacrebleu's metric, as it comes."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


def metric_problem(name: str) -> str | None:
    """Why the metric cannot be had: unknown, or its package is not installed; None: it can."""
    if name != LOSS and name not in GENERATED:
        return f"must be of {', '.join((LOSS, *GENERATED))}"
    package = NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        return f"needs the package {package.replace('_', '-')}: pip install 'bem_peft[metrics]'"
    return None


def text_scores(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> (N,) values, or for a corpus metric (N, S) counts of each sentence.

    Raises:
        ValueError: a metric that cannot be had, or other numbers of predictions and references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: must be as many.")
    texts = [(p.strip(), r.strip()) for p, r in zip(predictions, references, strict=True)]
    found: dict[str, np.ndarray] = {}
    for name in names:
        problem = metric_problem(name)
        if problem is not None or name == LOSS:
            raise ValueError(f"metric {name!r}: {problem or 'is no metric of text'}.")
        if name in CORPUS:
            found[name] = sentence_counts(corpus_metric(name), [p for p, _ in texts], [r for _, r in texts])
        else:
            found[name] = np.array([BY_ITEM[name](p, r) for p, r in texts])
    return found
