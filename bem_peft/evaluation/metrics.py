"""Metrics of generated text against one reference, item by item.

    exact_match    1 where prediction and reference are the same words                          Rajpurkar et al. 2016
    f1             2 c / (p + r), c common words of p predicted and r reference words           Rajpurkar et al. 2016
    rouge_l        F of the longest common subsequence, without stemming (`rouge-score`)        Lin 2004
    json_validity  1 where the prediction is a JSON document (RFC 8259; NaN and Infinity are none)
    bleu, chrf     counts of each sentence, which add up to the corpus score (`sacrebleu`)   Papineni 2002, Popovic 2015

The first four lie in [0, 1], BLEU and chrF in [0, 100]; higher is better. "The same words": lower case, without
punctuation and the articles a, an, the, as SQuAD's own script counts them, but for numbers, whose sign and point
count, and for other scripts (words.py). Spaces around a text do not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import numpy as np

from bem_peft.evaluation.corpus import CorpusMetric, sentence_counts
from bem_peft.evaluation.words import answer_words, is_unspaced, word_tokens

LOSS = "nll"
NEEDS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
CORPUS = ("bleu", "chrf")


def exact_match(prediction: str, reference: str) -> float:
    return float(answer_words(prediction) == answer_words(reference))


def f1(prediction: str, reference: str) -> float:
    """1 where both have no words, 0 where one has none."""
    predicted, expected = answer_words(prediction), answer_words(reference)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not predicted or not expected:
        return float(predicted == expected)
    return 2.0 * common / (len(predicted) + len(expected))


def json_validity(prediction: str, reference: str) -> float:
    """Of the prediction alone. One that nests deeper than Python's parser follows counts as none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        json.loads(prediction, parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


class _Tokenizer:
    """rouge-score's own tokenizer knows the letters a to z alone."""

    def tokenize(self, text: str) -> list[str]:
        return word_tokens(text)


def rouge_l(prediction: str, reference: str) -> float:
    """1 for two texts that are the same, whatever they hold."""
    from rouge_score.rouge_scorer import RougeScorer

    if prediction.strip() == reference.strip():
        return 1.0
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Tokenizer())
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


BY_ITEM: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match, "f1": f1, "rouge_l": rouge_l, "json_validity": json_validity,
}  # fmt: skip
GENERATED = (*BY_ITEM, *CORPUS)  # metrics that need generated text


def corpus_metric(name: str) -> CorpusMetric:
    """sacrebleu's metric, as it comes; what its counts add up to does not depend on how words were told apart."""
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


def bleu_of(references: Sequence[str]) -> CorpusMetric:
    """BLEU with words for these references: 13a, or each sign a word where most letters are of scripts without spaces.

    Raises:
        ValueError: no reference has four words, without which BLEU is 0 whatever is predicted.
    """
    from sacrebleu.metrics import BLEU

    found = BLEU(tokenize="char" if is_unspaced(list(references)) else "13a")
    if not any(len(found.tokenizer(reference).split()) >= 4 for reference in references):
        raise ValueError(
            "metric 'bleu': no reference has four words, so that BLEU is 0 for every prediction; take 'chrf', or "
            "'exact_match' and 'f1' for short answers."
        )
    return found


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
            expected = [reference for _, reference in texts]
            metric = bleu_of(expected) if name == "bleu" else corpus_metric(name)
            found[name] = sentence_counts(metric, [prediction for prediction, _ in texts], expected)
        else:
            found[name] = np.array([BY_ITEM[name](p, r) for p, r in texts])
    return found
